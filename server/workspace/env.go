package workspace

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// Environment variables that the daemon sets itself. The prefix WORKSPACE_ is
// reserved for them.
const (
	envID         = "WORKSPACE_ID"
	envUID        = "WORKSPACE_UID"
	envGeneration = "WORKSPACE_GENERATION"
	envAPI        = "WORKSPACE_API"   // with Spec.WorkspaceAPI
	envToken      = "WORKSPACE_TOKEN" // likewise; a file, if secrets are
)

// apiAddress is where a container finds the daemon, as gRPC names it.
const apiAddress = "unix://" + runtime.APIDir + "/" + runtime.APISocket

// Linux takes no more than a quarter of the stack's soft limit, 8 MiB by
// default, for arguments and environment together (execve(2)), and 128 KiB for
// one string. What is left free is for the image's own environment and the
// kernel's auxiliary vector.
const (
	maxExecBytes   = 2<<20 - 64<<10
	maxExecString  = 128<<10 - 1
	execStringCost = 9 // the terminating NUL and a pointer; runtime.Spec.LaunchBytes counts so
)

// plainEnv is the part of the environment that is known before the switch.
func plainEnv(spec *store.Spec) []string {
	env := make([]string, 0, len(spec.Env))
	for _, k := range slices.Sorted(maps.Keys(spec.Env)) {
		env = append(env, k+"="+spec.Env[k])
	}
	return env
}

// launchOf makes what a container of the spec is started with from a snapshot.
// In rising precedence: the image's environment (the driver lays this over it),
// the spec's, global secrets, the workspace's own, the model, the daemon's. A
// secret that is a file is no variable. An empty token is none.
func launchOf(spec *store.Spec, sn *store.Snapshot, generation int64, token seal.Plaintext) (runtime.Launch, error) {
	env := plainEnv(spec)
	var files []runtime.File
	versions := make(map[string]int64, len(sn.Secrets))
	var globals []string
	for _, s := range sn.Secrets {
		value := s.Value.Reveal()
		switch {
		case sn.Hidden(spec, s.Key):
			continue
		case s.File(spec):
			files = append(files, runtime.File{Name: s.Key, Data: []byte(value)})
		case strings.ContainsRune(value, 0):
			// It was a file by a newer spec than this one.
			return runtime.Launch{}, &runtime.Error{
				Reason:  reasonSecretUnreadable,
				Message: "secret " + s.Key + " holds a NUL, which an environment can't carry: it can only be delivered as a file",
			}
		default:
			env = append(env, s.Key+"="+value)
		}
		versions[s.Key] = s.Version
		if s.Global {
			globals = append(globals, s.Key)
		}
	}
	if sn.Workspace.Model != "" {
		for _, k := range spec.ModelVars() {
			env = append(env, k+"="+sn.Workspace.Model)
		}
	}
	env = append(env,
		envID+"="+sn.Workspace.ID,
		envUID+"="+sn.Workspace.UID,
		envGeneration+"="+strconv.FormatInt(generation, 10),
	)
	if token.Len() > 0 {
		env = append(env, envAPI+"="+apiAddress)
		if spec.SecretDelivery == store.DeliveryFiles {
			files = append(files, runtime.File{Name: envToken, Data: []byte(token.Reveal())})
		} else {
			env = append(env, envToken+"="+token.Reveal())
		}
	}
	if err := checkExecSize(env, spec.Command, spec.Args); err != nil {
		return runtime.Launch{}, err
	}
	return runtime.Launch{Generation: generation, SecretVersions: versions, GlobalSecrets: globals, Env: env, Files: files}, nil
}

// rotationOf makes what a running container takes in from a snapshot: the files,
// but for those that wait for the next start.
func rotationOf(sn *store.Snapshot) *runtime.Rotation {
	spec := &sn.Workspace.Spec
	r := &runtime.Rotation{
		Generation: sn.Workspace.Generation, SecretVersions: make(map[string]int64), Keep: sn.Staged, Signal: liveSignal(spec.LiveSignal),
	}
	if spec.WorkspaceAPI {
		r.Keep = append(slices.Clone(r.Keep), envToken) // as long as the container itself
	}
	for _, s := range sn.Secrets {
		if s.File(spec) && !sn.Hidden(spec, s.Key) && !slices.Contains(sn.Staged, s.Key) {
			r.Files = append(r.Files, runtime.File{Name: s.Key, Data: []byte(s.Value.Reveal())})
			r.SecretVersions[s.Key] = s.Version
			if s.Global {
				r.GlobalSecrets = append(r.GlobalSecrets, s.Key)
			}
		}
	}
	return r
}

func checkExecSize(lists ...[]string) error {
	total := 0
	for _, list := range lists {
		for _, s := range list {
			if len(s) > maxExecString {
				return &runtime.Error{
					Reason:  runtime.ReasonEnvironmentTooLarge,
					Message: fmt.Sprintf("an argument or variable has %d bytes, the kernel takes at most %d", len(s), maxExecString),
				}
			}
			total += len(s) + execStringCost
		}
	}
	if total > maxExecBytes {
		return &runtime.Error{
			Reason:  runtime.ReasonEnvironmentTooLarge,
			Message: fmt.Sprintf("arguments and environment take %d bytes, the kernel takes at most %d", total, maxExecBytes),
		}
	}
	return nil
}

// runtimeSpec is what a container of the workspace is prepared from, and what
// would be its launch now.
func runtimeSpec(w *store.Workspace, spec *store.Spec, generation int64, launch *runtime.Launch) runtime.Spec {
	size := 0
	for _, s := range launch.Env {
		size += len(s) + execStringCost
	}
	files := 0
	for _, f := range launch.Files {
		files += runtime.FileSize(f)
	}
	mounts := make([]runtime.Mount, 0, len(spec.Volumes))
	for _, v := range spec.Volumes {
		mounts = append(mounts, runtime.Mount{Path: v.MountPath, HostPath: v.HostPath, Volume: v.Name, ReadOnly: v.ReadOnly})
	}
	return runtime.Spec{
		WorkspaceID:  w.ID,
		WorkspaceUID: w.UID,
		Generation:   generation,
		Image:        spec.Image,
		Command:      spec.Command,
		Args:         spec.Args,
		Env:          plainEnv(spec),
		LaunchBytes:  size,
		FileBytes:    files,
		WorkingDir:   spec.WorkingDir,
		User:         spec.User,
		Resources: runtime.Resources{
			CPUMillis:   spec.Resources.CPUMillis,
			MemoryBytes: spec.Resources.MemoryBytes,
			Pids:        spec.Resources.Pids,
		},
		Profile:      runtime.Profile(spec.Security),
		Mounts:       mounts,
		ReadOnlyRoot: spec.ReadOnlyRoot,
		API:          spec.WorkspaceAPI,
	}
}
