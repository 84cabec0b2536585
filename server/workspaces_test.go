package server_test

import (
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
)

// fullSpec sets every field.
func fullSpec() *wsSpec {
	return &wsSpec{
		Image:      "registry.example/team/app@sha256:" + strings.Repeat("a", 64),
		Command:    []string{"/bin/app", ""},
		Args:       []string{"--flag", "x y"},
		Env:        map[string]string{"A": "1", "EMPTY": ""},
		WorkingDir: "/srv",
		User:       "app:1000",
		Resources:  &workspacev1.Resources{CpuMillis: 1500, MemoryBytes: 64 << 20, Pids: 100},
		Volumes: []*workspacev1.Volume{
			volume("/data", "data"),
			{MountPath: "/etc/app", ReadOnly: true, Source: &workspacev1.Volume_HostPath{HostPath: "/etc/app"}},
		},
		ReadOnlyRoot:    true,
		StopSignal:      "SIGINT",
		StopGracePeriod: durationpb.New(1500 * time.Millisecond),
		ModelEnv:        []string{"MODEL", "LLM"},
		SecurityProfile: workspacev1.SecurityProfile_SECURITY_PROFILE_BASELINE,
		CrashPolicy:     &workspacev1.CrashPolicy{Restart: workspacev1.CrashRestart_CRASH_RESTART_ON_FAILURE, MaxRetries: 5},
	}
}

func TestCreateKeepsEverything(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		resp := must2(h.Client.CreateWorkspace(h.ctx(), &createReq{
			WorkspaceId: "full",
			Workspace:   &ws{Name: "workspaces/ignored", Labels: map[string]string{"team": "a"}, Model: "gpt-4", Spec: fullSpec()},
			Secrets:     []*secret{text("TOKEN", "t"), {Key: "RAW", Payload: &workspacev1.SecretValue_Data{Data: []byte{0xff, 'x'}}}},
		}))(t)
		if resp.GetGeneration() != 1 || !resp.GetChanged() {
			t.Errorf("generation %d, changed %v", resp.GetGeneration(), resp.GetChanged())
		}
		got := h.WaitGeneration("full", 1)
		want := &ws{
			Name: "workspaces/full", Labels: map[string]string{"team": "a"}, Model: "gpt-4", Spec: fullSpec(),
			State: workspacev1.WorkspaceState_WORKSPACE_STATE_RUNNING, Generation: 1, ObservedGeneration: 1,
			ChangeReason:   workspacev1.ChangeReason_CHANGE_REASON_CREATED,
			SecretVersions: map[string]int64{"TOKEN": 1, "RAW": 1},
		}
		if diff := cmp.Diff(want, got, protocmp.Transform(), protocmp.IgnoreFields(&ws{},
			"uid", "etag", "create_time", "update_time", "image_digest", "container_id", "pid", "start_time")); diff != "" {
			t.Error(diff)
		}
		for field, ok := range map[string]bool{
			"uid": len(got.GetUid()) == 36, "etag": got.GetEtag() != "", "create_time": got.GetCreateTime().IsValid(),
			"update_time": got.GetUpdateTime().IsValid(), "image_digest": strings.HasPrefix(got.GetImageDigest(), "sha256:"),
			"container_id": got.GetContainerId() != "", "pid": got.GetPid() > 0, "start_time": got.GetStartTime().IsValid(),
		} {
			if !ok {
				t.Errorf("%s is not right: %v", field, got)
			}
		}
		h.wantEnv("full", "A=1", "TOKEN=t", "RAW=\xffx", "MODEL=gpt-4", "LLM=gpt-4")
	})
}

func TestCreateMakesAnID(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		seen := make(map[string]bool)
		for range 5 {
			resp := must2(h.Client.CreateWorkspace(h.ctx(), &createReq{Workspace: &ws{Spec: spec()}}))(t)
			name := resp.GetWorkspace().GetName()
			if !regexp.MustCompile(`^workspaces/ws-[a-z2-7]{10}$`).MatchString(name) || seen[name] {
				t.Errorf("got %s", name)
			}
			seen[name] = true
		}
	})
}

func TestUpdateMask(t *testing.T) {
	before := func() *ws {
		return &ws{Labels: map[string]string{"team": "a", "x": "y"}, Model: "gpt-4", Spec: fullSpec()}
	}
	for _, tt := range []struct {
		name  string
		to    *ws
		mask  *fieldmaskpb.FieldMask
		want  func(w *ws) // changes before
		bumps bool
	}{
		{name: "no mask, nothing", to: &ws{}, want: func(*ws) {}},
		{name: "no mask: what is set", to: &ws{Model: "m", Spec: &wsSpec{User: "bob", Env: map[string]string{"B": "2"}}},
			want: func(w *ws) { w.Model = "m"; w.Spec.User = "bob"; w.Spec.Env = map[string]string{"B": "2"} }, bumps: true},
		{name: "no mask: output only is ignored", to: &ws{Uid: "x", Generation: 99, Parked: true, Pid: 3, Labels: map[string]string{"a": "b"}},
			want: func(w *ws) { w.Labels = map[string]string{"a": "b"} }},
		{name: "empty mask is none", to: &ws{Model: "m"}, mask: &fieldmaskpb.FieldMask{},
			want: func(w *ws) { w.Model = "m" }, bumps: true},
		{name: "labels", to: &ws{Model: "ignored", Labels: map[string]string{"a": "b"}}, mask: mask("labels"),
			want: func(w *ws) { w.Labels = map[string]string{"a": "b"} }},
		{name: "labels cleared", to: &ws{}, mask: mask("labels"), want: func(w *ws) { w.Labels = nil }},
		{name: "model cleared", to: &ws{}, mask: mask("model"), want: func(w *ws) { w.Model = "" }, bumps: true},
		{name: "deep", to: &ws{Spec: &wsSpec{Resources: &workspacev1.Resources{Pids: 8}}}, mask: mask("spec.resources.pids"),
			want: func(w *ws) { w.Spec.Resources.Pids = 8 }, bumps: true},
		{name: "deep, cleared", to: &ws{}, mask: mask("spec.resources.pids", "spec.command"),
			want: func(w *ws) { w.Spec.Resources.Pids = 0; w.Spec.Command = nil }, bumps: true},
		{name: "all limits cleared", to: &ws{}, mask: mask("spec.resources"), want: func(w *ws) { w.Spec.Resources = nil }, bumps: true},
		{name: "stop signal and grace make no generation", to: &ws{Spec: &wsSpec{StopGracePeriod: durationpb.New(0)}}, mask: mask("spec.stop_signal", "spec.stop_grace_period"),
			want: func(w *ws) { w.Spec.StopSignal = ""; w.Spec.StopGracePeriod = durationpb.New(0) }},
		{name: "the crash policy makes no generation", to: &ws{Spec: &wsSpec{CrashPolicy: &workspacev1.CrashPolicy{Restart: workspacev1.CrashRestart_CRASH_RESTART_NEVER}}},
			mask: mask("spec.crash_policy.restart"),
			want: func(w *ws) { w.Spec.CrashPolicy.Restart = workspacev1.CrashRestart_CRASH_RESTART_NEVER }},
		{name: "the crash policy cleared", to: &ws{}, mask: mask("spec.crash_policy"), want: func(w *ws) { w.Spec.CrashPolicy = nil }},
		{name: "spec", to: &ws{Spec: spec()}, mask: mask("spec"), want: func(w *ws) { w.Spec = spec() }, bumps: true},
		{name: "everything", to: &ws{Spec: spec()}, mask: mask("*"), want: func(w *ws) { w.Spec = spec(); w.Model = ""; w.Labels = nil }, bumps: true},
		{name: "the same", to: before(), mask: mask("*"), want: func(*ws) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, func(t *testing.T, h *harness) {
				old := h.create("w", func(r *createReq) { r.Workspace = before() })
				want := before()
				tt.want(want)
				changed := !proto.Equal(want, before())

				tt.to.Name = "workspaces/w"
				resp := must2(h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: tt.to, UpdateMask: tt.mask}))(t)
				got := resp.GetWorkspace()
				if diff := cmp.Diff(want, &ws{Labels: got.GetLabels(), Model: got.GetModel(), Spec: got.GetSpec()}, protocmp.Transform()); diff != "" {
					t.Error(diff)
				}
				generation := int64(1)
				if tt.bumps {
					generation = 2
				}
				if resp.GetChanged() != changed || resp.GetGeneration() != generation {
					t.Errorf("changed %v, generation %d", resp.GetChanged(), resp.GetGeneration())
				}
				if (got.GetEtag() != old.GetEtag()) != changed {
					t.Errorf("etag from %s to %s", old.GetEtag(), got.GetEtag())
				}
				synctest.Wait()
				if diff := cmp.Diff(got.GetSpec(), h.get("workspaces/w").GetSpec(), protocmp.Transform()); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

func mask(paths ...string) *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: paths} }

func TestEtags(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		first := h.create("w", func(r *createReq) { r.Secrets = []*secret{text("S", "1")} })
		update := func(etag, model string) error {
			_, err := h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{Name: first.GetName(), Etag: etag, Model: model}})
			return err
		}
		if err := update(first.GetEtag(), "a"); err != nil {
			t.Fatal(err)
		}
		wantCode(t, update(first.GetEtag(), "b"), codes.Aborted, "ETAG_MISMATCH")
		// A status or a secret leaves the etag alone.
		now := h.get(first.GetName())
		h.set("workspaces/w/secrets/S", "2")
		synctest.Wait()
		if got := h.get(first.GetName()); got.GetEtag() != now.GetEtag() || got.GetObservedGeneration() != 3 {
			t.Errorf("etag %s, was %s; observed %d", got.GetEtag(), now.GetEtag(), got.GetObservedGeneration())
		}
		_, err := h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: first.GetName(), Etag: first.GetEtag()})
		wantCode(t, err, codes.Aborted, "ETAG_MISMATCH")

		s := must2(h.Client.GetSecret(h.ctx(), &workspacev1.GetSecretRequest{Name: "workspaces/w/secrets/S"}))(t).GetSecret()
		set := func(etag, value string) error {
			_, err := h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{
				Name: s.GetName(), Etag: etag, Payload: &workspacev1.SetSecretRequest_Text{Text: value},
			})
			return err
		}
		if err := set(s.GetEtag(), "3"); err != nil {
			t.Fatal(err)
		}
		wantCode(t, set(s.GetEtag(), "4"), codes.Aborted, "ETAG_MISMATCH")
		_, err = h.Client.DeleteSecret(h.ctx(), &workspacev1.DeleteSecretRequest{Name: s.GetName(), Etag: s.GetEtag()})
		wantCode(t, err, codes.Aborted, "ETAG_MISMATCH")
	})
}

func TestStopStartRestartSetModelDelete(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		name := h.create("w").GetName()
		restarted := must2(h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: name}))(t)
		if !restarted.GetChanged() || restarted.GetGeneration() != 2 || h.WaitGeneration("w", 2).GetRestartCount() != 1 {
			t.Errorf("restart: %v", restarted)
		}
		for i, changed := range []bool{true, false} {
			model := must2(h.Client.SetModel(h.ctx(), &workspacev1.SetModelRequest{Name: name, Model: "m"}))(t)
			if model.GetChanged() != changed || model.GetGeneration() != 3 {
				t.Errorf("model %d: %v", i, model)
			}
		}
		h.WaitGeneration("w", 3)
		h.wantEnv("w", "MODEL_PROVIDER=m")

		for i, changed := range []bool{true, false} {
			stopped := must2(h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: name}))(t)
			if stopped.GetChanged() != changed || stopped.GetGeneration() != 3 || !stopped.GetWorkspace().GetParked() {
				t.Errorf("stop %d: %v", i, stopped)
			}
		}
		synctest.Wait()
		if w := h.get(name); w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_STOPPED || w.GetContainerId() != "" || w.GetPid() != 0 {
			t.Errorf("stopped: %v", w)
		}
		_, err := h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: name})
		wantCode(t, err, codes.FailedPrecondition, "WORKSPACE_STOPPED")

		for i, changed := range []bool{true, false} {
			started := must2(h.Client.StartWorkspace(h.ctx(), &workspacev1.StartWorkspaceRequest{Name: name}))(t)
			if started.GetChanged() != changed || started.GetGeneration() != 4 {
				t.Errorf("start %d: %v", i, started)
			}
		}
		h.WaitGeneration("w", 4)

		gate := h.Runtime.Hold("RemoveWorkspace", "w") // the deletion is under way
		defer gate.Release()
		for i, changed := range []bool{true, false} {
			deleted := must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: name}))(t)
			if deleted.GetChanged() != changed || deleted.GetWorkspace().GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_DELETING {
				t.Errorf("delete %d: %v", i, deleted)
			}
			synctest.Wait()
		}
		for rpc, call := range byName(name, "") {
			err := call(h.Client, h.ctx())
			switch rpc {
			case "GetWorkspace", "DeleteWorkspace", "WaitWorkspace":
				if err != nil { // what was waited for has come about before
					t.Errorf("%s: %v", rpc, err)
				}
			default:
				wantCode(t, err, codes.FailedPrecondition, "WORKSPACE_DELETING")
			}
		}
		_, err = h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{Name: name, Model: "x"}})
		wantCode(t, err, codes.FailedPrecondition, "WORKSPACE_DELETING")
		wantCode(t, bySecret(name + "/secrets/A")["SetSecret"](h.Client, h.ctx()), codes.FailedPrecondition, "WORKSPACE_DELETING")
		_, err = h.Client.CreateWorkspace(h.ctx(), &createReq{WorkspaceId: "w", Workspace: &ws{Spec: spec()}})
		wantCode(t, err, codes.AlreadyExists, "WORKSPACE_EXISTS")

		gate.Release()
		synctest.Wait()
		_, err = h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: name})
		wantCode(t, err, codes.NotFound, "WORKSPACE_NOT_FOUND")
		missing := must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: name, AllowMissing: true}))(t)
		if missing.GetChanged() || missing.GetWorkspace() != nil {
			t.Errorf("missing: %v", missing)
		}
		if len(h.Runtime.Instances()) != 0 {
			t.Errorf("left: %v", h.Runtime.Instances())
		}
	})
}

func TestLastExit(t *testing.T) {
	for _, tt := range []struct {
		name string
		exit runtime.Exit
		want *workspacev1.LastExit
	}{
		{"code", runtime.Exit{Code: 3, Known: true}, &workspacev1.LastExit{Code: 3, CodeKnown: true}},
		{"killed", runtime.Exit{Code: 137, Known: true, Signal: 9, OOMKilled: true}, &workspacev1.LastExit{Code: 137, CodeKnown: true, Signal: "SIGKILL", OomKilled: true}},
		{"unknown", runtime.Exit{Code: 255}, &workspacev1.LastExit{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, func(t *testing.T, h *harness) {
				w := h.create("w")
				advance(time.Minute) // it did not end at once
				gate := h.HoldCycle("w")
				defer gate.Release()
				if !h.Runtime.Exit(w.GetContainerId(), tt.exit) {
					t.Fatal("it did not run")
				}
				tt.want.ExitTime = timestamppb.Now()
				synctest.Wait()
				now := h.get("workspaces/w")
				if diff := cmp.Diff(tt.want, now.GetLastExit(), protocmp.Transform()); diff != "" {
					t.Error(diff)
				}
				if now.GetContainerId() != "" || now.GetPid() != 0 || now.GetStartTime() != nil || len(now.GetSecretVersions()) != 0 {
					t.Errorf("it runs: %v", now)
				}
			})
		})
	}
}

func TestDeleteKeepsVolumesIfAsked(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for id, keep := range map[string]bool{"keep": true, "drop": false} {
			h.create(id, func(r *createReq) { r.Workspace.Spec.Volumes = []*workspacev1.Volume{volume("/data", "data")} })
			must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/" + id, KeepVolumes: keep}))(t)
			synctest.Wait()
			if got := len(h.Runtime.Volumes(id)) > 0; got != keep {
				t.Errorf("%s: volumes kept: %v", id, got)
			}
		}
	})
}

// TestValidateOnlyChangesNothing: every change answers as if it had been done.
func TestValidateOnlyChangesNothing(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		name := h.create("w", func(r *createReq) { r.Secrets = []*secret{text("S", "1")} }).GetName()
		h.create("parked")
		must2(h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: "workspaces/parked"}))(t)
		type answer interface {
			GetGeneration() int64
			GetChanged() bool
		}
		for rpc, call := range map[string]func() (answer, error){
			"Create": func() (answer, error) {
				return h.Client.CreateWorkspace(h.ctx(), &createReq{WorkspaceId: "new", Workspace: &ws{Spec: spec()}, Secrets: []*secret{text("A", "b")}, ValidateOnly: true, RequestId: "v1"})
			},
			"Update": func() (answer, error) {
				return h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{Name: name, Model: "m"}, ValidateOnly: true, RequestId: "v2"})
			},
			"Delete": func() (answer, error) {
				return h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: name, ValidateOnly: true})
			},
			"Restart": func() (answer, error) {
				return h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: name, ValidateOnly: true})
			},
			"Stop": func() (answer, error) {
				return h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: name, ValidateOnly: true})
			},
			"Start": func() (answer, error) {
				return h.Client.StartWorkspace(h.ctx(), &workspacev1.StartWorkspaceRequest{Name: "workspaces/parked", ValidateOnly: true})
			},
			"SetModel": func() (answer, error) {
				return h.Client.SetModel(h.ctx(), &workspacev1.SetModelRequest{Name: name, Model: "m", ValidateOnly: true})
			},
			"SetSecret": func() (answer, error) {
				return h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{Name: name + "/secrets/S", Payload: &workspacev1.SetSecretRequest_Text{Text: "2"}, ValidateOnly: true})
			},
			"DeleteSecret": func() (answer, error) {
				return h.Client.DeleteSecret(h.ctx(), &workspacev1.DeleteSecretRequest{Name: name + "/secrets/S", ValidateOnly: true})
			},
			"BatchUpdateSecrets": func() (answer, error) {
				return h.Client.BatchUpdateSecrets(h.ctx(), &workspacev1.BatchUpdateSecretsRequest{Parent: name, DeleteKeys: []string{"S"}, ValidateOnly: true})
			},
		} {
			h.wantUnchanged(func() {
				got, err := call()
				if err != nil {
					t.Fatalf("%s: %v", rpc, err)
				}
				if !got.GetChanged() || got.GetGeneration() == 0 {
					t.Errorf("%s: %v", rpc, got)
				}
			})
		}
	})
}
