package server_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
)

type (
	createReq = workspacev1.CreateWorkspaceRequest
	updateReq = workspacev1.UpdateWorkspaceRequest
	ws        = workspacev1.Workspace
	wsSpec    = workspacev1.WorkspaceSpec
	secret    = workspacev1.SecretValue
)

func text(key, value string) *secret {
	return &secret{Key: key, Payload: &workspacev1.SecretValue_Text{Text: value}}
}

func withSpec(edit func(*wsSpec)) *createReq {
	s := spec()
	edit(s)
	return &createReq{WorkspaceId: "new", Workspace: &ws{Spec: s}}
}

// badInput is a request that is refused. With no code it is INVALID_ARGUMENT.
type badInput struct {
	workspace bool // the caller has the role workspace, and no other
	name      string
	call      func(c workspacev1.WorkspaceControlClient, ctx context.Context) error
	code      codes.Code
	reason    string
	fields    []string // that the BadRequest names, all of them
	right     string   // a part of what it says would be right
}

func create(r *createReq) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		_, err := c.CreateWorkspace(ctx, r)
		return err
	}
}

func update(w *ws, paths ...string) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		r := &updateReq{Workspace: w}
		if len(paths) > 0 {
			r.UpdateMask = &fieldmaskpb.FieldMask{Paths: paths}
		}
		_, err := c.UpdateWorkspace(ctx, r)
		return err
	}
}

func setSecret(r *workspacev1.SetSecretRequest) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		_, err := c.SetSecret(ctx, r)
		return err
	}
}

func batch(r *workspacev1.BatchUpdateSecretsRequest) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		_, err := c.BatchUpdateSecrets(ctx, r)
		return err
	}
}

func list(r *workspacev1.ListWorkspacesRequest) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		_, err := c.ListWorkspaces(ctx, r)
		return err
	}
}

func watch(r *workspacev1.WatchWorkspacesRequest) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		stream, err := c.WatchWorkspaces(ctx, r)
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
}

// byName calls each RPC that has a name and no more than that to get wrong.
func byName(name, requestID string) map[string]func(workspacev1.WorkspaceControlClient, context.Context) error {
	type c = workspacev1.WorkspaceControlClient
	return map[string]func(c, context.Context) error{
		"GetWorkspace": func(c c, ctx context.Context) error {
			_, err := c.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: name})
			return err
		},
		"DeleteWorkspace": func(c c, ctx context.Context) error {
			_, err := c.DeleteWorkspace(ctx, &workspacev1.DeleteWorkspaceRequest{Name: name, RequestId: requestID})
			return err
		},
		"RestartWorkspace": func(c c, ctx context.Context) error {
			_, err := c.RestartWorkspace(ctx, &workspacev1.RestartWorkspaceRequest{Name: name, RequestId: requestID})
			return err
		},
		"StopWorkspace": func(c c, ctx context.Context) error {
			_, err := c.StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: name, RequestId: requestID})
			return err
		},
		"StartWorkspace": func(c c, ctx context.Context) error {
			_, err := c.StartWorkspace(ctx, &workspacev1.StartWorkspaceRequest{Name: name, RequestId: requestID})
			return err
		},
		"SetModel": func(c c, ctx context.Context) error {
			_, err := c.SetModel(ctx, &workspacev1.SetModelRequest{Name: name, RequestId: requestID, Model: "m"})
			return err
		},
		"WaitWorkspace": func(c c, ctx context.Context) error {
			_, err := c.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: name})
			return err
		},
	}
}

// bySecret calls each RPC that is about one secret.
func bySecret(name string) map[string]func(workspacev1.WorkspaceControlClient, context.Context) error {
	type c = workspacev1.WorkspaceControlClient
	return map[string]func(c, context.Context) error{
		"SetSecret": setSecret(&workspacev1.SetSecretRequest{Name: name, Payload: &workspacev1.SetSecretRequest_Text{Text: "v"}}),
		"GetSecret": func(c c, ctx context.Context) error {
			_, err := c.GetSecret(ctx, &workspacev1.GetSecretRequest{Name: name})
			return err
		},
		"DeleteSecret": func(c c, ctx context.Context) error {
			_, err := c.DeleteSecret(ctx, &workspacev1.DeleteSecretRequest{Name: name})
			return err
		},
		"RollBackSecret": rollBack(&workspacev1.RollBackSecretRequest{Name: name, Version: 1}),
	}
}

// byVersion calls each RPC that is about one version of a secret.
func byVersion(name, requestID string) map[string]func(workspacev1.WorkspaceControlClient, context.Context) error {
	type c = workspacev1.WorkspaceControlClient
	return map[string]func(c, context.Context) error{
		"EnableSecretVersion": func(c c, ctx context.Context) error {
			_, err := c.EnableSecretVersion(ctx, &workspacev1.EnableSecretVersionRequest{Name: name, RequestId: requestID})
			return err
		},
		"DisableSecretVersion": func(c c, ctx context.Context) error {
			_, err := c.DisableSecretVersion(ctx, &workspacev1.DisableSecretVersionRequest{Name: name, RequestId: requestID})
			return err
		},
		"DestroySecretVersion": func(c c, ctx context.Context) error {
			_, err := c.DestroySecretVersion(ctx, &workspacev1.DestroySecretVersionRequest{Name: name, RequestId: requestID})
			return err
		},
	}
}

func rollBack(r *workspacev1.RollBackSecretRequest) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		_, err := c.RollBackSecret(ctx, r)
		return err
	}
}

func listVersions(r *workspacev1.ListSecretVersionsRequest) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		_, err := c.ListSecretVersions(ctx, r)
		return err
	}
}

// byParent calls each RPC that is about a parent's secrets.
func byParent(parent string) map[string]func(workspacev1.WorkspaceControlClient, context.Context) error {
	type c = workspacev1.WorkspaceControlClient
	return map[string]func(c, context.Context) error{
		"BatchUpdateSecrets": batch(&workspacev1.BatchUpdateSecretsRequest{Parent: parent, Secrets: []*secret{text("K", "v")}}),
		"ListSecrets": func(c c, ctx context.Context) error {
			_, err := c.ListSecrets(ctx, &workspacev1.ListSecretsRequest{Parent: parent})
			return err
		},
	}
}

func badInputs() []badInput {
	big := strings.Repeat("x", 64<<10+1)
	named := func(edit func(*ws)) *ws {
		w := &ws{Name: "workspaces/old"}
		edit(w)
		return w
	}
	cases := []badInput{
		{name: "CreateWorkspace/nothing", call: create(&createReq{}), fields: []string{"workspace"}},
		{name: "CreateWorkspace/no spec", call: create(&createReq{Workspace: &ws{}}), fields: []string{"workspace.spec"}},
		{name: "CreateWorkspace/id", call: create(&createReq{WorkspaceId: "Bad_Id", Workspace: &ws{Spec: spec()}}), fields: []string{"workspace_id"}},
		{name: "CreateWorkspace/id too long", call: create(&createReq{WorkspaceId: strings.Repeat("a", 64), Workspace: &ws{Spec: spec()}}), fields: []string{"workspace_id"}},
		{name: "CreateWorkspace/request id", call: create(&createReq{RequestId: "a b", Workspace: &ws{Spec: spec()}}), fields: []string{"request_id"}},
		{name: "CreateWorkspace/taken", call: create(&createReq{WorkspaceId: "old", Workspace: &ws{Spec: spec()}}), code: codes.AlreadyExists, reason: "WORKSPACE_EXISTS"},
		{name: "CreateWorkspace/label key", call: create(&createReq{Workspace: &ws{Spec: spec(), Labels: map[string]string{"UPPER": "x"}}}), fields: []string{`workspace.labels["UPPER"]`}},
		{name: "CreateWorkspace/label value", call: create(&createReq{Workspace: &ws{Spec: spec(), Labels: map[string]string{"a": strings.Repeat("x", 257)}}}), fields: []string{`workspace.labels["a"]`}, right: "256"},
		{name: "CreateWorkspace/model", call: create(&createReq{Workspace: &ws{Spec: spec(), Model: "a\x00b"}}), fields: []string{"workspace.model"}},
		{name: "CreateWorkspace/no image", call: create(withSpec(func(s *wsSpec) { s.Image = "" })), fields: []string{"workspace.spec.image"}},
		{name: "CreateWorkspace/image", call: create(withSpec(func(s *wsSpec) { s.Image = "UPPER/case:x:y" })), fields: []string{"workspace.spec.image"}, right: "registry.example"},
		{name: "CreateWorkspace/command", call: create(withSpec(func(s *wsSpec) { s.Command = []string{"a\x00"} })), fields: []string{"workspace.spec.command[0]"}},
		{name: "CreateWorkspace/command too large", call: create(withSpec(func(s *wsSpec) { s.Args = slices.Repeat([]string{strings.Repeat("x", 32000)}, 5) })), fields: []string{"workspace.spec.args"}, right: "131072"},
		{name: "CreateWorkspace/env key", call: create(withSpec(func(s *wsSpec) { s.Env = map[string]string{"1A": "x"} })), fields: []string{`workspace.spec.env["1A"]`}},
		{name: "CreateWorkspace/env reserved", call: create(withSpec(func(s *wsSpec) { s.Env = map[string]string{"WORKSPACE_ID": "x"} })), fields: []string{`workspace.spec.env["WORKSPACE_ID"]`}, right: "WORKSPACE_"},
		{name: "CreateWorkspace/env value", call: create(withSpec(func(s *wsSpec) { s.Env = map[string]string{"A": strings.Repeat("€", 30000)} })), fields: []string{`workspace.spec.env["A"]`}, right: "65536"},
		{name: "CreateWorkspace/env too large", call: create(withSpec(func(s *wsSpec) {
			s.Env = make(map[string]string)
			for _, k := range strings.Split("A B C D E F G H I", " ") {
				s.Env[k] = strings.Repeat("x", 30000)
			}
		})), fields: []string{"workspace.spec.env"}, right: "262144"},
		{name: "CreateWorkspace/working dir", call: create(withSpec(func(s *wsSpec) { s.WorkingDir = "relative" })), fields: []string{"workspace.spec.working_dir"}},
		{name: "CreateWorkspace/user", call: create(withSpec(func(s *wsSpec) { s.User = "a b" })), fields: []string{"workspace.spec.user"}},
		{name: "CreateWorkspace/resources", call: create(withSpec(func(s *wsSpec) {
			s.Resources = &workspacev1.Resources{CpuMillis: -1, MemoryBytes: 5, Pids: 7}
		})), fields: []string{"workspace.spec.resources.cpu_millis", "workspace.spec.resources.memory_bytes", "workspace.spec.resources.pids"}, right: "6 MiB"},
		{name: "CreateWorkspace/stop signal", call: create(withSpec(func(s *wsSpec) { s.StopSignal = "SIGWHAT" })), fields: []string{"workspace.spec.stop_signal"}, right: "SIGTERM"},
		{name: "CreateWorkspace/grace", call: create(withSpec(func(s *wsSpec) { s.StopGracePeriod = durationpb.New(11 * time.Minute) })), fields: []string{"workspace.spec.stop_grace_period"}},
		{name: "CreateWorkspace/crash policy", call: create(withSpec(func(s *wsSpec) {
			s.CrashPolicy = &workspacev1.CrashPolicy{Restart: 99, MaxRetries: -1}
		})), fields: []string{"workspace.spec.crash_policy.restart", "workspace.spec.crash_policy.max_retries"}},
		{name: "CreateWorkspace/security profile", call: create(withSpec(func(s *wsSpec) { s.SecurityProfile = 99 })), fields: []string{"workspace.spec.security_profile"}},
		{name: "CreateWorkspace/model env", call: create(withSpec(func(s *wsSpec) { s.ModelEnv = []string{"WORKSPACE_MODEL", "1", "PATH"} })), fields: []string{"workspace.spec.model_env[0]", "workspace.spec.model_env[1]", "workspace.spec.model_env[2]"}},
		{name: "CreateWorkspace/model env twice", call: create(withSpec(func(s *wsSpec) { s.ModelEnv = []string{"A", "A"} })), fields: []string{"workspace.spec.model_env"}},
		{name: "CreateWorkspace/mounts", call: create(withSpec(func(s *wsSpec) {
			s.Volumes = []*workspacev1.Volume{
				volume("/data", "a"), volume("/data", "b"), volume("/proc/x", "c"), volume("/sys", "d"),
				volume("/run/workspaced/x", "e"), volume("/a/../b", "f"), volume("//", "g"), {MountPath: "/x"},
				{MountPath: "/y", Source: &workspacev1.Volume_HostPath{HostPath: "/srv/../etc"}},
				{MountPath: "/z", Source: &workspacev1.Volume_HostPath{HostPath: "srv"}},
			}
		})), fields: []string{
			"workspace.spec.volumes[1].mount_path", "workspace.spec.volumes[2].mount_path", "workspace.spec.volumes[3].mount_path",
			"workspace.spec.volumes[4].mount_path", "workspace.spec.volumes[5].mount_path", "workspace.spec.volumes[6].mount_path",
			"workspace.spec.volumes[7].source", "workspace.spec.volumes[8].host_path", "workspace.spec.volumes[9].host_path",
		}, right: "differ"},
		{name: "CreateWorkspace/volume name", call: create(withSpec(func(s *wsSpec) { s.Volumes = []*workspacev1.Volume{volume("/data", "../x")} })), fields: []string{"workspace.spec.volumes[0].volume_name"}},
		{name: "CreateWorkspace/secrets", call: create(&createReq{Workspace: &ws{Spec: spec()}, Secrets: []*secret{
			text("A", "x"), text("A", "y"), text("WORKSPACE_X", "x"), text("MODEL_PROVIDER", "x"), text("B-B", "x"), text("C", big), text("D", "a\x00"), {Key: "E"}, text("PATH", "/bin"),
		}}), fields: []string{"secrets[1].key", "secrets[2].key", "secrets[3].key", "secrets[4].key", "secrets[5].text", "secrets[6].text", "secrets[7].payload", "secrets[8].key"}},
		{name: "CreateWorkspace/quota", call: create(&createReq{Workspace: &ws{Spec: spec()}, Secrets: manySecrets(17)}), code: codes.ResourceExhausted, reason: "SECRETS_TOO_LARGE"},

		{name: "ListWorkspaces/page size", call: list(&workspacev1.ListWorkspacesRequest{PageSize: -1}), fields: []string{"page_size"}},
		{name: "ListWorkspaces/token", call: list(&workspacev1.ListWorkspacesRequest{PageToken: "AAAA"}), fields: []string{"page_token"}, right: "next_page_token"},
		{name: "ListWorkspaces/filter", call: list(&workspacev1.ListWorkspacesRequest{Filter: "colour = 3"}), fields: []string{"filter"}, right: "labels.team"},
		{name: "ListWorkspaces/order", call: list(&workspacev1.ListWorkspacesRequest{OrderBy: "colour"}), fields: []string{"order_by"}, right: "create_time"},

		{name: "UpdateWorkspace/nothing", call: update(nil), fields: []string{"workspace"}},
		{name: "UpdateWorkspace/name", call: update(&ws{Name: "old"}), fields: []string{"workspace.name"}, right: "workspaces/{workspace}"},
		{name: "UpdateWorkspace/unknown", call: update(&ws{Name: "workspaces/none", Model: "m"}), code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "UpdateWorkspace/etag", call: update(named(func(w *ws) { w.Etag = `"x"`; w.Model = "m" })), code: codes.Aborted, reason: "ETAG_MISMATCH"},
		{name: "UpdateWorkspace/mask", call: update(named(func(w *ws) { w.Model = "m" }), "model", "colour"), fields: []string{"update_mask"}, right: "`colour`"},
		{name: "UpdateWorkspace/mask of output", call: update(named(func(w *ws) { w.Model = "m" }), "state"), fields: []string{"update_mask"}, right: "`state`"},
		{name: "UpdateWorkspace/mask of name", call: update(named(func(w *ws) { w.Model = "m" }), "name"), fields: []string{"update_mask"}},
		{name: "UpdateWorkspace/mask of etag", call: update(named(func(w *ws) { w.Model = "m" }), "etag"), fields: []string{"update_mask"}},
		{name: "UpdateWorkspace/mask into a map", call: update(named(func(w *ws) { w.Labels = map[string]string{"a": "b"} }), "labels.a"), fields: []string{"update_mask"}, right: "as a whole"},
		{name: "UpdateWorkspace/mask into a list", call: update(named(func(w *ws) { w.Spec = spec() }), "spec.volumes.mount_path"), fields: []string{"update_mask"}},
		{name: "UpdateWorkspace/mask into a duration", call: update(named(func(w *ws) { w.Spec = spec() }), "spec.stop_grace_period.seconds"), fields: []string{"update_mask"}},
		{name: "UpdateWorkspace/mask empty path", call: update(named(func(w *ws) { w.Spec = spec() }), ""), fields: []string{"update_mask"}},
		{name: "UpdateWorkspace/mask * and more", call: update(named(func(w *ws) { w.Spec = spec() }), "*", "model"), fields: []string{"update_mask"}},
		{name: "UpdateWorkspace/* without spec", call: update(named(func(w *ws) { w.Model = "m" }), "*"), fields: []string{"workspace.spec"}},
		{name: "UpdateWorkspace/spec cleared", call: update(named(func(*ws) {}), "spec"), fields: []string{"workspace.spec"}},
		{name: "UpdateWorkspace/image cleared", call: update(named(func(*ws) {}), "spec.image"), fields: []string{"workspace.spec.image"}},
		{name: "UpdateWorkspace/env", call: update(named(func(w *ws) { w.Spec = &wsSpec{Env: map[string]string{"WORKSPACE_A": "x"}} })), fields: []string{`workspace.spec.env["WORKSPACE_A"]`}},
		{name: "UpdateWorkspace/model env is a secret", call: update(named(func(w *ws) { w.Spec = &wsSpec{ModelEnv: []string{"TOKEN"}} })), code: codes.FailedPrecondition, reason: "KEY_CARRIES_MODEL"},

		{name: "DeleteWorkspace/etag", call: func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
			_, err := c.DeleteWorkspace(ctx, &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/old", Etag: `"x"`})
			return err
		}, code: codes.Aborted, reason: "ETAG_MISMATCH"},
		{name: "RestartWorkspace/stopped", call: byName("workspaces/parked", "")["RestartWorkspace"], code: codes.FailedPrecondition, reason: "WORKSPACE_STOPPED"},
		{name: "SetModel/model", call: func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
			_, err := c.SetModel(ctx, &workspacev1.SetModelRequest{Name: "workspaces/old", Model: strings.Repeat("x", 1025)})
			return err
		}, fields: []string{"model"}, right: "1024"},

		{name: "SetSecret/nothing", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A"}), fields: []string{"payload"}},
		{name: "SetSecret/no value", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A"}), fields: []string{"payload"}, right: "text, or data"},
		{name: "CreateWorkspace/no image", call: create(&createReq{Workspace: &ws{Spec: &wsSpec{}}}), fields: []string{"workspace.spec.image"}, right: "is required"},
		{name: "CreateWorkspace/no source", call: create(withSpec(func(s *wsSpec) { s.Volumes = []*workspacev1.Volume{{MountPath: "/data"}} })), fields: []string{"workspace.spec.volumes[0].source"}, right: "host_path and volume_name"},
		{name: "SetSecret/path", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/PATH", Payload: &workspacev1.SetSecretRequest_Text{Text: "/bin"}}), fields: []string{"name"}, right: "spec.env"},
		{name: "SetSecret/reserved", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/WORKSPACE_A", Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}}), fields: []string{"name"}, right: "WORKSPACE_"},
		{name: "SetSecret/too large", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: big}}), fields: []string{"text"}, right: "65536 bytes, not 65537"},
		{name: "SetSecret/too large data", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A", Payload: &workspacev1.SetSecretRequest_Data{Data: []byte(big)}}), fields: []string{"data"}, right: "65536 bytes, not 65537"},
		{name: "SetSecret/NUL", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A", Payload: &workspacev1.SetSecretRequest_Data{Data: []byte("a\x00")}}), code: codes.FailedPrecondition, reason: "SECRET_NEEDS_FILES"},
		{name: "SetSecret/NUL into the environment", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A", Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_ENV, Payload: &workspacev1.SetSecretRequest_Data{Data: []byte("a\x00")}}), fields: []string{"data"}, right: "SECRET_DELIVERY_FILES"},
		{name: "SetSecret/delivery", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A", Delivery: 9, Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}}), fields: []string{"delivery"}},
		{name: "SetSecret/live variable", call: setSecret(&workspacev1.SetSecretRequest{Name: "workspaces/old/secrets/TOKEN", Apply: workspacev1.Apply_APPLY_LIVE, Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}}), code: codes.FailedPrecondition, reason: "SECRET_NOT_LIVE"},
		{name: "SetSecret/live global, up to the specs", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A", Apply: workspacev1.Apply_APPLY_LIVE, Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}}), code: codes.FailedPrecondition, reason: "SECRET_NOT_LIVE"},
		{name: "DeleteSecret/live variable", call: func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
			_, err := c.DeleteSecret(ctx, &workspacev1.DeleteSecretRequest{Name: "workspaces/old/secrets/TOKEN", Apply: workspacev1.Apply_APPLY_LIVE})
			return err
		}, code: codes.FailedPrecondition, reason: "SECRET_NOT_LIVE"},
		{name: "UpdateWorkspace/live signal", call: update(named(func(w *ws) { w.Spec = &wsSpec{LiveSignal: "SIGKILL"} })), fields: []string{"workspace.spec.live_signal"}, right: "SIGHUP"},
		{name: "BatchUpdateSecrets/NUL", call: batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "workspaces/old", Secrets: []*secret{text("A", "x"), text("B", "\x00")}}), code: codes.FailedPrecondition, reason: "SECRET_NEEDS_FILES"},
		{name: "CreateWorkspace/NUL", call: create(&createReq{Workspace: &ws{Spec: spec()}, Secrets: []*secret{text("A", "x"), text("B", "\x00")}}), fields: []string{"secrets[1].text"}, right: "SECRET_DELIVERY_FILES"},
		{name: "CreateWorkspace/delivery", call: create(withSpec(func(s *wsSpec) { s.SecretDelivery = workspacev1.SecretDelivery_SECRET_DELIVERY_SPEC })), fields: []string{"workspace.spec.secret_delivery"}, right: "SECRET_DELIVERY_FILES"},
		{name: "CreateWorkspace/volume over the files", call: create(withSpec(func(s *wsSpec) {
			s.Volumes = []*workspacev1.Volume{{MountPath: "/run/secrets/a", Source: &workspacev1.Volume_VolumeName{VolumeName: "v"}}}
		})), fields: []string{"workspace.spec.volumes[0].mount_path"}, right: "/run/secrets"},
		{name: "SetSecret/apply", call: setSecret(&workspacev1.SetSecretRequest{Name: "secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}, Apply: 9}), fields: []string{"apply"}},
		{name: "SetSecret/etag", call: setSecret(&workspacev1.SetSecretRequest{Name: "workspaces/old/secrets/TOKEN", Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}, Etag: `"v9"`}), code: codes.Aborted, reason: "ETAG_MISMATCH"},
		{name: "SetSecret/etag of none", call: setSecret(&workspacev1.SetSecretRequest{Name: "workspaces/old/secrets/NONE", Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}, Etag: `"v1"`}), code: codes.Aborted, reason: "ETAG_MISMATCH"},
		{name: "SetSecret/model", call: setSecret(&workspacev1.SetSecretRequest{Name: "workspaces/old/secrets/MODEL_PROVIDER", Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}}), code: codes.FailedPrecondition, reason: "KEY_CARRIES_MODEL"},
		{name: "SetSecret/unknown workspace", call: bySecret("workspaces/none/secrets/A")["SetSecret"], code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "GetSecret/unknown", call: bySecret("workspaces/old/secrets/NONE")["GetSecret"], code: codes.NotFound, reason: "SECRET_NOT_FOUND"},
		{name: "GetSecret/unknown global", call: bySecret("secrets/NONE")["GetSecret"], code: codes.NotFound, reason: "SECRET_NOT_FOUND"},
		{name: "GetSecret/unknown workspace", call: bySecret("workspaces/none/secrets/A")["GetSecret"], code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "DeleteSecret/unknown", call: bySecret("workspaces/old/secrets/NONE")["DeleteSecret"], code: codes.NotFound, reason: "SECRET_NOT_FOUND"},
		{name: "DeleteSecret/unknown workspace", call: bySecret("workspaces/none/secrets/A")["DeleteSecret"], code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "DeleteSecret/etag", call: func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
			_, err := c.DeleteSecret(ctx, &workspacev1.DeleteSecretRequest{Name: "workspaces/old/secrets/TOKEN", Etag: `"v9"`})
			return err
		}, code: codes.Aborted, reason: "ETAG_MISMATCH"},

		{name: "RollBackSecret/no version", call: rollBack(&workspacev1.RollBackSecretRequest{Name: "secrets/A"}), fields: []string{"version"}, right: "greater than or equal to 1"},
		{name: "RollBackSecret/negative", call: rollBack(&workspacev1.RollBackSecretRequest{Name: "secrets/A", Version: -1, Apply: 9, RequestId: "ü"}), fields: []string{"version", "apply", "request_id"}},
		{name: "RollBackSecret/unknown", call: bySecret("workspaces/old/secrets/NONE")["RollBackSecret"], code: codes.NotFound, reason: "SECRET_NOT_FOUND"},
		{name: "RollBackSecret/unknown workspace", call: bySecret("workspaces/none/secrets/A")["RollBackSecret"], code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "RollBackSecret/unknown version", call: rollBack(&workspacev1.RollBackSecretRequest{Name: "workspaces/old/secrets/TOKEN", Version: 2}), code: codes.NotFound, reason: "SECRET_VERSION_NOT_FOUND"},
		{name: "RollBackSecret/etag", call: rollBack(&workspacev1.RollBackSecretRequest{Name: "workspaces/old/secrets/TOKEN", Version: 1, Etag: `"v9"`}), code: codes.Aborted, reason: "ETAG_MISMATCH"},
		{name: "DisableSecretVersion/current", call: byVersion("workspaces/old/secrets/TOKEN/versions/1", "")["DisableSecretVersion"], code: codes.FailedPrecondition, reason: "SECRET_VERSION_CURRENT"},
		{name: "DestroySecretVersion/current", call: byVersion("workspaces/old/secrets/TOKEN/versions/1", "")["DestroySecretVersion"], code: codes.FailedPrecondition, reason: "SECRET_VERSION_CURRENT"},
		{name: "ListSecretVersions/unknown", call: listVersions(&workspacev1.ListSecretVersionsRequest{Parent: "workspaces/old/secrets/NONE"}), code: codes.NotFound, reason: "SECRET_NOT_FOUND"},
		{name: "ListSecretVersions/unknown workspace", call: listVersions(&workspacev1.ListSecretVersionsRequest{Parent: "workspaces/none/secrets/A"}), code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "ListSecretVersions/parent", call: listVersions(&workspacev1.ListSecretVersionsRequest{Parent: "workspaces/old"}), fields: []string{"parent"}, right: "secrets/"},
		{name: "ListSecretVersions/page size", call: listVersions(&workspacev1.ListSecretVersionsRequest{Parent: "secrets/A", PageSize: -1}), fields: []string{"page_size"}},
		{name: "ListSecretVersions/token", call: listVersions(&workspacev1.ListSecretVersionsRequest{Parent: "workspaces/old/secrets/TOKEN", PageToken: "x"}), fields: []string{"page_token"}, right: "next_page_token"},

		{name: "BatchUpdateSecrets/twice", call: batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "workspaces/old", Secrets: []*secret{text("A", "x"), text("B", "x"), text("A", "y")}, DeleteKeys: []string{"B", "C", "C"}}), fields: []string{"secrets[2].key", "delete_keys[0]", "delete_keys[2]"}, right: "secrets[0].key"},
		{name: "BatchUpdateSecrets/one bad", call: batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "workspaces/old", Secrets: []*secret{text("A", "x"), text("B", big)}, DeleteKeys: []string{"TOKEN", "a-b"}}), fields: []string{"secrets[1].text", "delete_keys[1]"}},
		{name: "BatchUpdateSecrets/model", call: batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "workspaces/old", Secrets: []*secret{text("A", "x"), text("MODEL_PROVIDER", "x")}}), code: codes.FailedPrecondition, reason: "KEY_CARRIES_MODEL"},
		{name: "BatchUpdateSecrets/quota", call: batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "workspaces/old", Secrets: manySecrets(17)}), code: codes.ResourceExhausted, reason: "SECRETS_TOO_LARGE"},
		{name: "BatchUpdateSecrets/global quota", call: batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "global", Secrets: manySecrets(5)}), code: codes.ResourceExhausted, reason: "SECRETS_TOO_LARGE"},
		{name: "BatchUpdateSecrets/too long a message", call: batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "global", Secrets: manySecrets(65)}), code: codes.ResourceExhausted},
		{name: "BatchUpdateSecrets/unknown workspace", call: byParent("workspaces/none")["BatchUpdateSecrets"], code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "ListSecrets/unknown workspace", call: byParent("workspaces/none")["ListSecrets"], code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "ListSecrets/token", call: func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
			_, err := c.ListSecrets(ctx, &workspacev1.ListSecretsRequest{Parent: "global", PageToken: "x", PageSize: 1})
			return err
		}, fields: []string{"page_token"}},

		{name: "WaitWorkspace/generation", call: func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
			_, err := c.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/old", Generation: 99})
			return err
		}, fields: []string{"generation"}, right: "newest"},
		{name: "WaitWorkspace/until", call: func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
			_, err := c.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/old", Generation: -1, Until: 7})
			return err
		}, fields: []string{"generation", "until"}},
		{name: "Heartbeat/name", workspace: true, call: heartbeat("old"), fields: []string{"name"}, right: "workspaces/{workspace}"},
		{name: "Heartbeat/unknown", workspace: true, call: heartbeat("workspaces/none"), code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "FetchSecrets/name", workspace: true, call: fetch(&workspacev1.FetchSecretsRequest{Name: "old"}), fields: []string{"name"}, right: "workspaces/{workspace}"},
		{name: "FetchSecrets/unknown", workspace: true, call: fetch(fetchReq("none")), code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"},
		{name: "FetchSecrets/key", workspace: true, call: fetch(fetchReq("old", "a-b")), fields: []string{"keys[0]"}},
		{name: "FetchSecrets/key twice", workspace: true, call: fetch(fetchReq("old", "A", "A")), fields: []string{"keys"}},
		{name: "WatchWorkspaces/filter", call: watch(&workspacev1.WatchWorkspacesRequest{Filter: "x"}), fields: []string{"filter"}},
		{name: "WatchWorkspaces/filter too long", call: watch(&workspacev1.WatchWorkspacesRequest{Filter: strings.Repeat("x", 2049)}), fields: []string{"filter"}},
		{name: "WatchWorkspaces/token", call: watch(&workspacev1.WatchWorkspacesRequest{ResumeToken: "x"}), fields: []string{"resume_token"}},
	}
	for rpc, call := range byName("old", "") {
		cases = append(cases, badInput{name: rpc + "/name", call: call, fields: []string{"name"}, right: "workspaces/"})
	}
	for rpc, call := range byName("workspaces/none", "") {
		cases = append(cases, badInput{name: rpc + "/unknown", call: call, code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"})
	}
	for rpc, call := range byName("workspaces/old", "ü") {
		if rpc != "GetWorkspace" && rpc != "WaitWorkspace" {
			cases = append(cases, badInput{name: rpc + "/request id", call: call, fields: []string{"request_id"}})
		}
	}
	for _, name := range []string{"", "secrets/", "secrets/a-b", "workspaces/old/secrets/1", "workspaces/old", "global/secrets/A"} {
		for rpc, call := range bySecret(name) {
			cases = append(cases, badInput{name: rpc + "/name " + name, call: call, fields: []string{"name"}, right: "secrets/"})
		}
	}
	for _, name := range []string{"", "secrets/A", "secrets/A/versions/", "secrets/A/versions/0", "secrets/A/versions/01", "secrets/A/versions/-1", "secrets/A/versions/1234567890123456789", "workspaces/old/versions/1", "secrets/a-b/versions/1"} {
		for rpc, call := range byVersion(name, "") {
			cases = append(cases, badInput{name: rpc + "/name " + name, call: call, fields: []string{"name"}, right: "/versions/{version}"})
		}
	}
	for rpc, call := range byVersion("secrets/A/versions/1", "ü") {
		cases = append(cases, badInput{name: rpc + "/request id", call: call, fields: []string{"request_id"}})
	}
	for rpc, call := range byVersion("workspaces/old/secrets/TOKEN/versions/9", "") {
		cases = append(cases, badInput{name: rpc + "/unknown version", call: call, code: codes.NotFound, reason: "SECRET_VERSION_NOT_FOUND"})
	}
	for rpc, call := range byVersion("workspaces/none/secrets/A/versions/1", "") {
		cases = append(cases, badInput{name: rpc + "/unknown workspace", call: call, code: codes.NotFound, reason: "WORKSPACE_NOT_FOUND"})
	}
	for _, parent := range []string{"", "old", "workspaces/", "globals"} {
		for rpc, call := range byParent(parent) {
			cases = append(cases, badInput{name: rpc + "/parent " + parent, call: call, fields: []string{"parent"}, right: "global"})
		}
	}
	return cases
}

// badInputClients are those whom bad input is from: true has the role workspace.
func (h *harness) badInputClients() map[bool]workspacev1.WorkspaceControlClient {
	h.t.Helper()
	workspace := access.Subject{Name: "x", Grants: []access.Grant{{Roles: access.RolesOf(workspacev1.Role_ROLE_WORKSPACE)}}}
	return map[bool]workspacev1.WorkspaceControlClient{false: h.Client, true: must2(h.As(workspace))(h.t).Client}
}

func heartbeat(name string) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		_, err := c.Heartbeat(ctx, &workspacev1.HeartbeatRequest{Name: name})
		return err
	}
}

func fetch(req *workspacev1.FetchSecretsRequest) func(workspacev1.WorkspaceControlClient, context.Context) error {
	return func(c workspacev1.WorkspaceControlClient, ctx context.Context) error {
		_, err := c.FetchSecrets(ctx, req)
		return err
	}
}

func volume(path, name string) *workspacev1.Volume {
	return &workspacev1.Volume{MountPath: path, Source: &workspacev1.Volume_VolumeName{VolumeName: name}}
}

// manySecrets are n of the greatest size.
func manySecrets(n int) []*secret {
	var all []*secret
	for i := range n {
		all = append(all, text("K"+strings.Repeat("I", i), strings.Repeat("x", 64<<10)))
	}
	return all
}

// TestContract22_BadInput: wrong input gets one code, names each field and what
// would be right, and changes nothing.
func TestContract22_BadInput(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("old", func(r *createReq) { r.Secrets = []*secret{text("TOKEN", "x")} })
		h.create("parked")
		must2(h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: "workspaces/parked"}))(h.t)

		clients := h.badInputClients()
		covered := make(map[string]bool)
		for _, tt := range badInputs() {
			rpc, _, _ := strings.Cut(tt.name, "/")
			covered[rpc] = true
			h.wantUnchanged(func() {
				err := tt.call(clients[tt.workspace], h.ctx())
				if tt.code == codes.OK {
					tt.code, tt.reason = codes.InvalidArgument, "INVALID_FIELDS"
				}
				if !checkBadInput(t, tt, err) {
					t.Logf("error: %v", err)
				}
			})
		}
		methods := workspacev1.File_workspace_v1_workspace_control_proto.Services().Get(0).Methods()
		for i := range methods.Len() {
			if name := string(methods.Get(i).Name()); !covered[name] {
				t.Errorf("%s has no bad input", name)
			}
		}
	})
}

func checkBadInput(t *testing.T, tt badInput, err error) bool {
	t.Helper()
	before := t.Failed()
	got := slices.Sorted(maps.Keys(fields(err)))
	want := slices.Sorted(slices.Values(tt.fields))
	if code := codeOf(err); code != tt.code {
		t.Errorf("%s: got %v, want %v", tt.name, code, tt.code)
	}
	if reason := reasonOf(err); reason != tt.reason {
		t.Errorf("%s: got reason %q, want %q", tt.name, reason, tt.reason)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s: fields: %s", tt.name, diff)
	}
	all := strings.Join(slices.Collect(maps.Values(fields(err))), "\n")
	if !strings.Contains(all, tt.right) {
		t.Errorf("%s: %q does not say %q", tt.name, all, tt.right)
	}
	for field, right := range fields(err) {
		if right == "" {
			t.Errorf("%s: %s has no description", tt.name, field)
		}
	}
	return before == t.Failed()
}

// TestStatusIsSmall: however much is wrong, the status fits into the trailers.
func TestStatusIsSmall(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		labels, env := make(map[string]string), make(map[string]string)
		for i := range 1000 {
			labels[strings.Repeat("€", 500)+fmt.Sprint(i)] = ""
			env[strings.Repeat("€", 500)+fmt.Sprint(i)] = ""
		}
		var secrets []*secret
		for range 600 {
			secrets = append(secrets, text(strings.Repeat("-", 500), ""))
		}
		for name, call := range map[string]func(workspacev1.WorkspaceControlClient, context.Context) error{
			"create": create(&createReq{Workspace: &ws{Labels: labels, Spec: &wsSpec{Image: image, Env: env}}, Secrets: secrets}),
			"batch":  batch(&workspacev1.BatchUpdateSecretsRequest{Parent: "global", Secrets: secrets, DeleteKeys: slices.Repeat([]string{strings.Repeat("-", 500)}, 600)}),
			"filter": list(&workspacev1.ListWorkspacesRequest{Filter: strings.Repeat("€", 2000)}),
			"quoted": list(&workspacev1.ListWorkspacesRequest{Filter: `"` + strings.Repeat("€", 2000)}),
			"mask":   update(&ws{Name: "workspaces/old"}, slices.Repeat([]string{strings.Repeat("€", 5000)}, 50)...),
		} {
			err := call(h.Client, h.ctx())
			wantCode(t, err, codes.InvalidArgument, "INVALID_FIELDS")
			if n := proto.Size(status.Convert(err).Proto()); n > 6000 {
				t.Errorf("%s: %d bytes", name, n)
			}
		}
	})
}
