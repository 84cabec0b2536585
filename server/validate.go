package server

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
)

// Limits beyond those in the .proto. With the secrets' own they keep a
// container's arguments and environment below what execve(2) takes: 128 KiB a
// string and 2 MiB in all.
const (
	// MaxEnvBytes is the size of spec.env: keys and values.
	MaxEnvBytes = 256 << 10
	// MaxEnvValueBytes is the size of one value of spec.env.
	MaxEnvValueBytes = 64 << 10
	// MaxCommandBytes is the size of spec.command and spec.args together, each
	// string with its terminating NUL.
	MaxCommandBytes = 128 << 10
	// ReservedPrefix is that of the variables that the daemon sets itself.
	ReservedPrefix = "WORKSPACE_"
)

// validateRequest checks everything about a request that needs no stored state.
func validateRequest(req proto.Message) error {
	var vs violations
	if err := addRules(&vs, "", req); err != nil {
		return err
	}
	switch req := req.(type) {
	case *workspacev1.CreateWorkspaceRequest:
		checkSpec(&vs, "workspace.spec", req.GetWorkspace().GetSpec())
		checkSecretValues(&vs, req.GetSecrets(), nil)
		checkFirstSecrets(&vs, req)
	case *workspacev1.UpdateWorkspaceRequest:
		// The rest is checked once the mask was applied.
		if req.GetWorkspace() == nil {
			vs.add("workspace", "is required")
		} else if _, err := parseWorkspaceName("", req.GetWorkspace().GetName()); err != nil {
			vs.add("workspace.name", "must be %s", workspacePattern)
		}
	case *workspacev1.SetSecretRequest:
		if _, key, err := parseSecretName("", req.GetName()); err == nil {
			checkLateKey(&vs, "name", key)
		}
		checkValue(&vs, "", req)
	case *workspacev1.BatchUpdateSecretsRequest:
		checkSecretValues(&vs, req.GetSecrets(), req.GetDeleteKeys())
	case *workspacev1.CreateTokenRequest:
		checkToken(&vs, req.GetToken())
	}
	return vs.err()
}

// validateWorkspace checks a workspace that an update would bring about.
func validateWorkspace(w *workspacev1.Workspace) error {
	var vs violations
	if err := addRules(&vs, "workspace.", w); err != nil {
		return err
	}
	checkSpec(&vs, "workspace.spec", w.GetSpec())
	return vs.err()
}

func checkSpec(vs *violations, at string, spec *workspacev1.WorkspaceSpec) {
	if spec == nil {
		return
	}
	if _, err := reference.ParseNormalizedNamed(spec.GetImage()); err != nil {
		vs.add(at+".image", "must be an image reference in lower case, like registry.example/team/app:1.2 or app@sha256:...")
	}
	total := 0
	for _, s := range slices.Concat(spec.GetCommand(), spec.GetArgs()) {
		total += len(s) + 1
	}
	if total > MaxCommandBytes {
		vs.add(at+".args", "must, with command, be at most %d bytes in all, not %d", MaxCommandBytes, total)
	}
	checkEnv(vs, at+".env", spec.GetEnv())
	for i, key := range spec.GetModelEnv() {
		checkLateKey(vs, fmt.Sprintf("%s.model_env[%d]", at, i), key)
	}
	checkVolumes(vs, at+".volumes", spec.GetVolumes())
	if spec.GetSecretDelivery() == workspacev1.SecretDelivery_SECRET_DELIVERY_SPEC {
		vs.add(at+".secret_delivery", "must be SECRET_DELIVERY_ENV or SECRET_DELIVERY_FILES: this is the spec that others follow")
	}
}

func checkEnv(vs *violations, at string, env map[string]string) {
	total := 0
	for _, key := range slices.Sorted(maps.Keys(env)) {
		field := fmt.Sprintf("%s[%q]", at, key)
		checkKey(vs, field, key)
		if n := len(env[key]); n > MaxEnvValueBytes {
			vs.add(field, "must be at most %d bytes, not %d", MaxEnvValueBytes, n)
		}
		total += len(key) + len(env[key])
	}
	if total > MaxEnvBytes {
		vs.add(at, "must be at most %d bytes in all, not %d", MaxEnvBytes, total)
	}
}

func checkVolumes(vs *violations, at string, volumes []*workspacev1.Volume) {
	taken := make(map[string]int)
	for i, volume := range volumes {
		field := fmt.Sprintf("%s[%d].mount_path", at, i)
		mount := volume.GetMountPath()
		first, dup := taken[mount]
		taken[mount] = i
		switch clean := path.Clean(mount); {
		case mount != clean:
			vs.add(field, "must be the shortest form of the path: %q", clean)
		case dup:
			vs.add(field, "must differ from that of volumes[%d]", first)
		case mount == "/" || under(mount, "/proc") || under(mount, "/sys") || under(mount, runtime.FilesDir) || strings.HasPrefix(mount, "/run/workspaced"):
			vs.add(field, "must not be /, or in /proc, /sys, /run/workspaced or %s", runtime.FilesDir)
		}
		if host := volume.GetHostPath(); host != "" && host != path.Clean(host) {
			vs.add(fmt.Sprintf("%s[%d].host_path", at, i), "must be the shortest form of the path: %q", path.Clean(host))
		}
	}
}

func under(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// checkKey refuses the names of variables that the daemon sets itself.
func checkKey(vs *violations, field, key string) {
	if strings.HasPrefix(key, ReservedPrefix) {
		vs.add(field, "must not begin with %s: these are the daemon's own variables", ReservedPrefix)
	}
}

// checkLateKey is checkKey for what is delivered when the old container has
// ended: a PATH that comes so late could make a command unfindable that was
// found before.
func checkLateKey(vs *violations, field, key string) {
	if key == "PATH" {
		vs.add(field, "must not be PATH, by which the command is found: set it in spec.env")
		return
	}
	checkKey(vs, field, key)
}

// checkSecretValues checks a batch: each key at most once, in whichever list.
func checkSecretValues(vs *violations, secrets []*workspacev1.SecretValue, deleteKeys []string) {
	first := make(map[string]string)
	once := func(field, key string) {
		if other, dup := first[key]; dup && key != "" {
			vs.add(field, "must be there once: %s is the same key", other)
			return
		}
		first[key] = field
	}
	for i, secret := range secrets {
		at := fmt.Sprintf("secrets[%d]", i)
		checkLateKey(vs, at+".key", secret.GetKey())
		checkValue(vs, at+".", secret)
		once(at+".key", secret.GetKey())
	}
	for i, key := range deleteKeys {
		once(fmt.Sprintf("delete_keys[%d]", i), key)
	}
}

// checkValue checks a secret's value. What it says never holds the value.
func checkValue(vs *violations, prefix string, p payload) {
	field, value := valueField(prefix, p), payloadOf(p)
	if len(value) > store.MaxValueBytes {
		vs.add(field, "must be at most %d bytes, not %d", store.MaxValueBytes, len(value))
	} else if p.GetDelivery() == workspacev1.SecretDelivery_SECRET_DELIVERY_ENV {
		checkNUL(vs, field, value) // of all others the store knows
	}
}

// valueField is the field that carries the value.
func valueField(prefix string, p payload) string {
	if p.GetData() != nil {
		return prefix + "data"
	}
	return prefix + "text"
}

func checkNUL(vs *violations, field string, value []byte) {
	if slices.Contains(value, 0) {
		vs.add(field, "must not contain a NUL byte, which an environment can't carry: set delivery to SECRET_DELIVERY_FILES")
	}
}

// checkFirstSecrets refuses secrets of a new workspace under the names that carry
// its model, and values that its environment can't. For one that exists the store
// knows.
func checkFirstSecrets(vs *violations, req *workspacev1.CreateWorkspaceRequest) {
	spec := store.Spec{ModelEnv: req.GetWorkspace().GetSpec().GetModelEnv()}
	files := req.GetWorkspace().GetSpec().GetSecretDelivery() == workspacev1.SecretDelivery_SECRET_DELIVERY_FILES
	for i, secret := range req.GetSecrets() {
		if secret.GetDelivery() != workspacev1.SecretDelivery_SECRET_DELIVERY_FILES && !files {
			checkNUL(vs, valueField(fmt.Sprintf("secrets[%d].", i), secret), payloadOf(secret))
		}
		if slices.Contains(spec.ModelVars(), secret.GetKey()) {
			vs.add(fmt.Sprintf("secrets[%d].key", i), "must not be one of workspace.spec.model_env (by default %s): it carries the model", store.DefaultModelEnv)
		}
	}
}
