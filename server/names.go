package server

import (
	"crypto/rand"
	"regexp"
	"strconv"
	"strings"

	"github.com/workspaced/workspaced/store"
)

// Resource names (AIP-122).
const (
	workspacePattern       = "workspaces/{workspace}"
	workspaceSecretPattern = "workspaces/{workspace}/secrets/{secret}"
	globalSecretPattern    = "secrets/{secret}"
	versionPattern         = "{secret}/versions/{version}"
	// globalParent is the parent of the secrets of all workspaces.
	globalParent = "global"
)

// Types of resources, as google.rpc.ResourceInfo and PreconditionFailure name
// them.
const (
	workspaceType = "workspace.v1.Workspace"
	secretType    = "workspace.v1.Secret"
	versionType   = "workspace.v1.SecretVersion"
)

const (
	workspacesPrefix = "workspaces/"
	secretsPrefix    = "secrets/"
	versionsInfix    = "/versions/"
)

func workspaceName(id string) string { return workspacesPrefix + id }

func secretName(workspaceID, key string) string {
	if workspaceID == "" {
		return secretsPrefix + key
	}
	return workspacesPrefix + workspaceID + "/" + secretsPrefix + key
}

func versionName(workspaceID, key string, version int64) string {
	return secretName(workspaceID, key) + versionsInfix + strconv.FormatInt(version, 10)
}

// scopeName is the parent of a scope's secrets.
func scopeName(scope store.Scope) string {
	if scope.Global() {
		return globalParent
	}
	return workspaceName(scope.WorkspaceID)
}

// Every call parses a name, some a few: by hand it takes a hundredth of what a
// parser of patterns does.

func parseWorkspaceName(field, name string) (id string, err error) {
	if id, ok := strings.CutPrefix(name, workspacesPrefix); ok && isSegment(id) {
		return id, nil
	}
	return "", invalid(field, "must be %s", workspacePattern)
}

func parseSecretName(field, name string) (scope store.Scope, key string, err error) {
	if key, ok := strings.CutPrefix(name, secretsPrefix); ok && isSegment(key) {
		return store.Scope{}, key, nil
	}
	if rest, ok := strings.CutPrefix(name, workspacesPrefix); ok {
		id, rest, _ := strings.Cut(rest, "/")
		if key, ok := strings.CutPrefix(rest, secretsPrefix); ok && isSegment(id) && isSegment(key) {
			return store.Scope{WorkspaceID: id}, key, nil
		}
	}
	return store.Scope{}, "", invalid(field, "must be %s or %s", workspaceSecretPattern, globalSecretPattern)
}

// What names and request ids are made of, as the rules in the .proto say.
var (
	resourceName  = regexp.MustCompile(`^(global|workspaces/[a-z]([a-z0-9-]{0,61}[a-z0-9])?(/secrets/[A-Za-z_][A-Za-z0-9_]{0,127}(/versions/[0-9]{1,18})?)?|secrets/[A-Za-z_][A-Za-z0-9_]{0,127}(/versions/[0-9]{1,18})?|tokens/[a-z0-9]{1,63})$`)
	requestIDName = regexp.MustCompile(`^[\x21-\x7e]{1,128}$`)
)

func parseVersionName(field, name string) (scope store.Scope, key string, version int64, err error) {
	i := max(0, strings.LastIndex(name, versionsInfix)) // a workspace may be called so, too
	scope, key, err = parseSecretName(field, name[:i])
	version, parseErr := strconv.ParseInt(strings.TrimPrefix(name[i:], versionsInfix), 10, 64)
	if err != nil || parseErr != nil || version < 1 {
		return store.Scope{}, "", 0, invalid(field, "must be %s or %s", strings.Replace(versionPattern, "{secret}", workspaceSecretPattern, 1), strings.Replace(versionPattern, "{secret}", globalSecretPattern, 1))
	}
	return scope, key, version, nil
}

// isSegment reports whether s can stand between two slashes of a name. What it is
// made of, the rules in the .proto say.
func isSegment(s string) bool { return s != "" && !strings.Contains(s, "/") }

func parseParent(field, parent string) (store.Scope, error) {
	if parent == globalParent {
		return store.Scope{}, nil
	}
	id, err := parseWorkspaceName(field, parent)
	if err != nil {
		return store.Scope{}, invalid(field, "must be %s or %q", workspacePattern, globalParent)
	}
	return store.Scope{WorkspaceID: id}, nil
}

// madePrefix is how the ids begin that newWorkspaceID makes.
const madePrefix = "ws-"

// newWorkspaceID makes an id of 50 random bits.
func newWorkspaceID() string { return madePrefix + strings.ToLower(rand.Text()[:10]) }
