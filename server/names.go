package server

import (
	"crypto/rand"
	"strings"

	"go.einride.tech/aip/resourcename"

	"github.com/workspaced/workspaced/store"
)

// Resource names (AIP-122).
const (
	workspacePattern       = "workspaces/{workspace}"
	workspaceSecretPattern = "workspaces/{workspace}/secrets/{secret}"
	globalSecretPattern    = "secrets/{secret}"
	// globalParent is the parent of the secrets of all workspaces.
	globalParent = "global"
)

// Types of resources, as google.rpc.ResourceInfo and PreconditionFailure name
// them.
const (
	workspaceType = "workspace.v1.Workspace"
	secretType    = "workspace.v1.Secret"
)

func workspaceName(id string) string { return resourcename.Sprint(workspacePattern, id) }

func secretName(workspaceID, key string) string {
	if workspaceID == "" {
		return resourcename.Sprint(globalSecretPattern, key)
	}
	return resourcename.Sprint(workspaceSecretPattern, workspaceID, key)
}

// scopeName is the parent of a scope's secrets.
func scopeName(scope store.Scope) string {
	if scope.Global() {
		return globalParent
	}
	return workspaceName(scope.WorkspaceID)
}

func parseWorkspaceName(field, name string) (id string, err error) {
	// Sscan alone also takes full names, placeholders, and empty ids.
	if err := resourcename.Sscan(name, workspacePattern, &id); err != nil || id == "" || workspaceName(id) != name {
		return "", invalid(field, "must be %s", workspacePattern)
	}
	return id, nil
}

func parseSecretName(field, name string) (scope store.Scope, key string, err error) {
	if err := resourcename.Sscan(name, globalSecretPattern, &key); err == nil && key != "" && secretName("", key) == name {
		return store.Scope{}, key, nil
	}
	err = resourcename.Sscan(name, workspaceSecretPattern, &scope.WorkspaceID, &key)
	if err != nil || scope.WorkspaceID == "" || key == "" || secretName(scope.WorkspaceID, key) != name {
		return store.Scope{}, "", invalid(field, "must be %s or %s", workspaceSecretPattern, globalSecretPattern)
	}
	return scope, key, nil
}

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

// newWorkspaceID makes an id of 50 random bits.
func newWorkspaceID() string { return "ws-" + strings.ToLower(rand.Text()[:10]) }
