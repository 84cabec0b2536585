package server_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
)

func TestSecretLife(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		const name = "workspaces/w/secrets/TOKEN"
		born := timestamppb.Now()
		first := h.set(name, "one")
		want := &workspacev1.Secret{
			Name: name, Key: "TOKEN", Scope: workspacev1.SecretScope_SECRET_SCOPE_WORKSPACE, Version: 1, SizeBytes: 3,
			CreateTime: born, UpdateTime: born, Etag: `"v1"`,
			Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_SPEC,
		}
		if diff := cmp.Diff(want, first.GetSecret(), protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		if first.GetGeneration() != 2 || !first.GetChanged() || first.GetAffectedWorkspaces() != 1 {
			t.Errorf("first: %v", first)
		}
		h.WaitGeneration("w", 2)
		h.wantEnv("w", "TOKEN=one")

		advance(time.Minute)
		if same := h.set(name, "one"); same.GetChanged() || same.GetGeneration() != 2 || same.GetAffectedWorkspaces() != 0 || same.GetSecret().GetVersion() != 1 {
			t.Errorf("equal is equal: %v", same)
		}
		second := h.set(name, "twotwo")
		want.Version, want.SizeBytes, want.Etag, want.UpdateTime = 2, 6, `"v2"`, timestamppb.Now()
		if diff := cmp.Diff(want, second.GetSecret(), protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		got := must2(h.Client.GetSecret(h.ctx(), &workspacev1.GetSecretRequest{Name: name}))(t).GetSecret()
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}

		deleted := must2(h.Client.DeleteSecret(h.ctx(), &workspacev1.DeleteSecretRequest{Name: name}))(t)
		if !deleted.GetChanged() || deleted.GetGeneration() != 4 || deleted.GetAffectedWorkspaces() != 1 {
			t.Errorf("deleted: %v", deleted)
		}
		missing := must2(h.Client.DeleteSecret(h.ctx(), &workspacev1.DeleteSecretRequest{Name: name, AllowMissing: true}))(t)
		if missing.GetChanged() || missing.GetGeneration() != 4 {
			t.Errorf("missing: %v", missing)
		}
		h.WaitGeneration("w", 4)
		for _, e := range h.env("w") {
			if strings.HasPrefix(e, "TOKEN=") {
				t.Errorf("it runs with %s", e)
			}
		}
		if again := h.set(name, "three").GetSecret(); again.GetVersion() != 3 {
			t.Errorf("a key that is set again has version %d", again.GetVersion())
		}
	})
}

func TestGlobalSecrets(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for _, id := range []string{"a", "b", "own"} {
			h.create(id)
		}
		h.set("workspaces/own/secrets/SHARED", "mine")
		synctest.Wait()
		set := h.set("secrets/SHARED", "everyone's")
		if set.GetGeneration() != 0 || !set.GetChanged() || set.GetAffectedWorkspaces() != 2 {
			t.Errorf("set: %v", set)
		}
		if s := set.GetSecret(); s.GetName() != "secrets/SHARED" || s.GetScope() != workspacev1.SecretScope_SECRET_SCOPE_GLOBAL {
			t.Errorf("got %v", s)
		}
		for _, id := range []string{"a", "b", "own"} {
			w := h.WaitGeneration(id, 0)
			if w.GetGeneration() != 2 {
				t.Errorf("%s is at %d", id, w.GetGeneration())
			}
		}
		h.wantEnv("a", "SHARED=everyone's")
		h.wantEnv("own", "SHARED=mine")
		if w := h.get("workspaces/a"); w.GetChangeReason() != workspacev1.ChangeReason_CHANGE_REASON_GLOBAL_SECRET {
			t.Errorf("reason %v", w.GetChangeReason())
		}
	})
}

func TestApplyAtTheNextStart(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		resp := must2(h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{
			Name: "workspaces/w/secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}, Apply: workspacev1.Apply_APPLY_NEXT_START,
		}))(t)
		if !resp.GetChanged() || resp.GetGeneration() != 1 || resp.GetAffectedWorkspaces() != 0 {
			t.Errorf("got %v", resp)
		}
		synctest.Wait()
		if w := h.get("workspaces/w"); w.GetReconciling() || w.GetRestartCount() != 0 {
			t.Errorf("it was restarted: %v", w)
		}
		restarted := must2(h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/w"}))(t)
		h.WaitGeneration("w", restarted.GetGeneration())
		h.wantEnv("w", "A=x")
	})
}

// A file is what was sent, and where it belongs.
func TestSecretsAreFiles(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		binary := []byte("\x00\xff\n")
		h.create("w", func(r *createReq) {
			r.Workspace.Spec.SecretDelivery = workspacev1.SecretDelivery_SECRET_DELIVERY_FILES
			r.Secrets = []*secret{
				{Key: "CERT", Payload: &workspacev1.SecretValue_Data{Data: binary}},
				{Key: "TOKEN", Payload: &workspacev1.SecretValue_Text{Text: "t"}, Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_ENV},
			}
		})
		must2(h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{
			Name: "secrets/CA", Payload: &workspacev1.SetSecretRequest_Data{Data: binary}, Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_FILES,
		}))(t)
		w := h.WaitGeneration("w", 2)
		if diff := cmp.Diff(map[string]int64{"CERT": 1, "TOKEN": 1, "CA": 1}, w.GetSecretVersions()); diff != "" {
			t.Error(diff)
		}
		if w.GetSpec().GetSecretDelivery() != workspacev1.SecretDelivery_SECRET_DELIVERY_FILES {
			t.Errorf("the spec says %v", w.GetSpec().GetSecretDelivery())
		}
		h.wantEnv("w", "TOKEN=t")
		for key, want := range map[string]string{"CERT": string(binary), "CA": string(binary)} {
			if got, err := h.Runtime.ReadFile(w.GetContainerId(), "/run/secrets/"+key); err != nil || got != want {
				t.Errorf("%s = %q, %v", key, got, err)
			}
		}
		if got, err := h.Runtime.ReadFile(w.GetContainerId(), "/run/secrets/TOKEN"); err == nil {
			t.Errorf("TOKEN is a file too, %q", got)
		}
		for name, want := range map[string]workspacev1.SecretDelivery{
			"workspaces/w/secrets/CERT":  workspacev1.SecretDelivery_SECRET_DELIVERY_SPEC,
			"workspaces/w/secrets/TOKEN": workspacev1.SecretDelivery_SECRET_DELIVERY_ENV,
			"secrets/CA":                 workspacev1.SecretDelivery_SECRET_DELIVERY_FILES,
		} {
			got := must2(h.Client.GetSecret(h.ctx(), &workspacev1.GetSecretRequest{Name: name}))(t).GetSecret().GetDelivery()
			if got != want {
				t.Errorf("%s is delivered by %v, want %v", name, got, want)
			}
		}
		// What has a NUL does not go into the environment.
		_, err := h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{
			Name: "workspaces/w", Spec: &wsSpec{SecretDelivery: workspacev1.SecretDelivery_SECRET_DELIVERY_ENV},
		}})
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "CERT") {
			t.Errorf("update = %v", err)
		}
	})
}

// A live change is waited for like any other, and nothing is restarted.
func TestApplyLive(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w", func(r *createReq) {
			r.Workspace.Spec.LiveSignal = "SIGHUP"
			r.Secrets = []*secret{{Key: "CERT", Payload: &workspacev1.SecretValue_Text{Text: "1"}, Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_FILES}}
		})
		before := h.WaitGeneration("w", 1)
		gate := h.Runtime.Hold(runtimetest.Rotate, "w")
		resp := must2(h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{
			Name: "workspaces/w/secrets/CERT", Payload: &workspacev1.SetSecretRequest_Text{Text: "2"}, Apply: workspacev1.Apply_APPLY_LIVE,
		}))(t)
		if !resp.GetChanged() || resp.GetGeneration() != 2 || resp.GetAffectedWorkspaces() != 1 {
			t.Errorf("got %v", resp)
		}
		synctest.Wait()
		if w := h.get("workspaces/w"); !w.GetReconciling() || w.GetSecretVersions()["CERT"] != 1 || w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_RUNNING {
			t.Errorf("not yet taken in: %v", w)
		}
		gate.Release()
		w := h.WaitGeneration("w", 2)
		if w.GetReconciling() || w.GetSecretVersions()["CERT"] != 2 || w.GetContainerId() != before.GetContainerId() || w.GetPid() != before.GetPid() || w.GetRestartCount() != 0 {
			t.Errorf("taken in: %v", w)
		}
		if got := h.Runtime.Files(w.GetContainerId())["CERT"]; got != "2" {
			t.Errorf("the file holds %q", got)
		}
		batch := must2(h.Client.BatchUpdateSecrets(h.ctx(), &workspacev1.BatchUpdateSecretsRequest{
			Parent: "global", Apply: workspacev1.Apply_APPLY_LIVE,
			Secrets: []*secret{{Key: "CA", Payload: &workspacev1.SecretValue_Text{Text: "ca"}, Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_FILES}},
		}))(t)
		if batch.GetAffectedWorkspaces() != 1 {
			t.Errorf("global: %v", batch)
		}
		gone := must2(h.Client.DeleteSecret(h.ctx(), &workspacev1.DeleteSecretRequest{Name: "workspaces/w/secrets/CERT", Apply: workspacev1.Apply_APPLY_LIVE}))(t)
		w = h.WaitGeneration("w", gone.GetGeneration())
		if diff := cmp.Diff(map[string]string{"CA": "ca"}, h.Runtime.Files(w.GetContainerId())); diff != "" || w.GetContainerId() != before.GetContainerId() {
			t.Errorf("%s %v", diff, w)
		}
	})
}

// Nothing runs that would take a live change in, and nothing will: a wait says so.
func TestApplyLive_ContainerHasEnded(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w", func(r *createReq) {
			r.Workspace.Spec.CrashPolicy = &workspacev1.CrashPolicy{Restart: workspacev1.CrashRestart_CRASH_RESTART_NEVER}
		})
		w := h.WaitGeneration("w", 1)
		h.Runtime.Exit(w.GetContainerId(), runtime.Exit{Known: true})
		synctest.Wait()
		resp := must2(h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{
			Name: "workspaces/w/secrets/CERT", Payload: &workspacev1.SetSecretRequest_Text{Text: "2"}, Apply: workspacev1.Apply_APPLY_LIVE,
			Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_FILES,
		}))(t)
		synctest.Wait()
		_, err := h.Client.WaitWorkspace(h.ctx(), &workspacev1.WaitWorkspaceRequest{Name: "workspaces/w", Generation: resp.GetGeneration()})
		if status.Code(err) != codes.FailedPrecondition || reasonOf(err) != "WORKSPACE_EXITED" {
			t.Errorf("wait = %v", err)
		}
		if w := h.get("workspaces/w"); w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_EXITED || w.GetReconciling() {
			t.Errorf("got %v", w)
		}
	})
}

func TestBatchIsOneGeneration(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w", func(r *createReq) { r.Secrets = []*secret{text("OLD", "1"), text("SAME", "2")} })
		resp := must2(h.Client.BatchUpdateSecrets(h.ctx(), &workspacev1.BatchUpdateSecretsRequest{
			Parent:  "workspaces/w",
			Secrets: []*secret{text("Z", "z"), text("SAME", "2"), text("A", "a")}, DeleteKeys: []string{"OLD", "NEVER_THERE"},
		}))(t)
		var got []string
		for _, s := range resp.GetSecrets() {
			got = append(got, fmt.Sprint(s.GetKey(), s.GetVersion()))
		}
		if diff := cmp.Diff([]string{"Z1", "SAME1", "A1"}, got); diff != "" {
			t.Error(diff)
		}
		if resp.GetGeneration() != 2 || !resp.GetChanged() || resp.GetAffectedWorkspaces() != 1 {
			t.Errorf("got %v", resp)
		}
		if w := h.WaitGeneration("w", 2); w.GetRestartCount() != 1 {
			t.Errorf("restarted %d times", w.GetRestartCount())
		}
		empty := must2(h.Client.BatchUpdateSecrets(h.ctx(), &workspacev1.BatchUpdateSecretsRequest{Parent: "workspaces/w"}))(t)
		if empty.GetChanged() || empty.GetGeneration() != 2 {
			t.Errorf("an empty batch: %v", empty)
		}
		global := must2(h.Client.BatchUpdateSecrets(h.ctx(), &workspacev1.BatchUpdateSecretsRequest{Parent: "global", Secrets: []*secret{text("G", "g")}}))(t)
		if global.GetGeneration() != 0 || global.GetAffectedWorkspaces() != 1 || global.GetSecrets()[0].GetName() != "secrets/G" {
			t.Errorf("global: %v", global)
		}
	})
}

func TestListSecretsPages(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		var values []*secret
		var want []string
		for i := range 25 {
			values = append(values, text(fmt.Sprintf("K%02d", i), "x"))
			want = append(want, fmt.Sprintf("K%02d", i))
		}
		for _, parent := range []string{"workspaces/w", "global"} {
			must2(h.Client.BatchUpdateSecrets(h.ctx(), &workspacev1.BatchUpdateSecretsRequest{Parent: parent, Secrets: values}))(t)
			for _, size := range []int32{0, 1, 10, 25, 1000} {
				var got []string
				req := &workspacev1.ListSecretsRequest{Parent: parent, PageSize: size}
				for {
					resp := must2(h.Client.ListSecrets(h.ctx(), req))(t)
					for _, s := range resp.GetSecrets() {
						got = append(got, s.GetKey())
					}
					if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
						break
					}
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s, pages of %d: %s", parent, size, diff)
				}
			}
		}
		token := must2(h.Client.ListSecrets(h.ctx(), &workspacev1.ListSecretsRequest{Parent: "global", PageSize: 1}))(t).GetNextPageToken()
		_, err := h.Client.ListSecrets(h.ctx(), &workspacev1.ListSecretsRequest{Parent: "workspaces/w", PageToken: token})
		if fields(err)["page_token"] == "" {
			t.Errorf("another parent's token: %v", err)
		}
	})
}
