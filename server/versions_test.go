package server_test

import (
	"fmt"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// versions says what there is of a secret, newest first: the number, a star for
// the current one, what it was restored from, and the state if it is no usual one.
func (h *harness) versions(secret string) string {
	h.t.Helper()
	var words []string
	for _, v := range must2(h.Client.ListSecretVersions(h.ctx(), &workspacev1.ListSecretVersionsRequest{Parent: secret}))(h.t).GetSecretVersions() {
		word := fmt.Sprint(v.GetVersion())
		if v.GetCurrent() {
			word += "*"
		}
		if v.GetRestoredVersion() != 0 {
			word += fmt.Sprint("<", v.GetRestoredVersion())
		}
		if state := strings.ToLower(strings.TrimPrefix(v.GetState().String(), "SECRET_VERSION_STATE_")); state != "enabled" {
			word += " " + state
		}
		if want := fmt.Sprint(secret, "/versions/", v.GetVersion()); v.GetName() != want {
			h.t.Errorf("the name is %s, want %s", v.GetName(), want)
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

func (h *harness) wantVersions(secret, want string) {
	h.t.Helper()
	if got := h.versions(secret); got != want {
		h.t.Errorf("%s has %s, want %s", secret, got, want)
	}
}

// A rollback is a change like any other: one generation, one cycle, and the
// workspace tells which version its container has; the same again is none.
func TestRollBackSecret(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		const name = "workspaces/w/secrets/TOKEN"
		born := timestamppb.Now()
		for _, v := range []string{"one", "two", "three"} {
			h.set(name, v)
			advance(time.Minute)
		}
		h.WaitGeneration("w", 4)
		h.wantEnv("w", "TOKEN=three")

		r := must2(h.Client.RollBackSecret(h.ctx(), &workspacev1.RollBackSecretRequest{Name: name, Version: 1}))(t)
		want := &workspacev1.RollBackSecretResponse{
			Secret: &workspacev1.Secret{
				Name: name, Key: "TOKEN", Scope: workspacev1.SecretScope_SECRET_SCOPE_WORKSPACE, Version: 4, SizeBytes: 3,
				CreateTime: born, UpdateTime: timestamppb.Now(), Etag: `"v4"`, Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_SPEC,
			},
			Generation: 5, Changed: true, AffectedWorkspaces: 1,
		}
		if diff := cmp.Diff(want, r, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		w := h.WaitGeneration("w", 5)
		h.wantEnv("w", "TOKEN=one")
		if v := w.GetSecretVersions()["TOKEN"]; v != 4 || len(w.GetGlobalSecrets()) != 0 || w.GetRestartCount() != 4 {
			t.Errorf("it runs with version %d after %d restarts, global: %v", v, w.GetRestartCount(), w.GetGlobalSecrets())
		}
		h.wantVersions(name, "4*<1, 3, 2, 1")

		again := must2(h.Client.RollBackSecret(h.ctx(), &workspacev1.RollBackSecretRequest{Name: name, Version: 1}))(t)
		if again.GetChanged() || again.GetGeneration() != 5 || again.GetAffectedWorkspaces() != 0 || again.GetSecret().GetVersion() != 4 {
			t.Errorf("equal is equal: %v", again)
		}
		next := must2(h.Client.RollBackSecret(h.ctx(), &workspacev1.RollBackSecretRequest{Name: name, Version: 3, Apply: workspacev1.Apply_APPLY_NEXT_START, Etag: `"v4"`}))(t)
		if !next.GetChanged() || next.GetGeneration() != 5 || next.GetSecret().GetVersion() != 5 {
			t.Errorf("at the next start: %v", next)
		}
		synctest.Wait()
		h.wantEnv("w", "TOKEN=one")
		if v := h.get("workspaces/w").GetSecretVersions()["TOKEN"]; v != 4 {
			t.Errorf("it runs with version %d", v)
		}
		must2(h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/w"}))(t)
		if w := h.WaitGeneration("w", 6); w.GetSecretVersions()["TOKEN"] != 5 {
			t.Errorf("it runs with version %d", w.GetSecretVersions()["TOKEN"])
		}
		h.wantEnv("w", "TOKEN=three")
		h.wantVersions(name, "5*<3, 4<1, 3, 2, 1")
		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		h.wantVersions(name, "5*<3, 4<1, 3, 2, 1")
	})
}

// A rollback of a global secret reaches who sees it, and each workspace tells
// whose version it has, also after a restart of the daemon.
func TestRollBackSecret_Global(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for _, id := range []string{"a", "own"} {
			h.create(id)
		}
		h.set("workspaces/own/secrets/SHARED", "mine")
		h.set("secrets/SHARED", "first")
		h.set("secrets/SHARED", "second")
		h.set("workspaces/a/secrets/MINE", "x")
		r := must2(h.Client.RollBackSecret(h.ctx(), &workspacev1.RollBackSecretRequest{Name: "secrets/SHARED", Version: 1}))(t)
		if r.GetGeneration() != 0 || !r.GetChanged() || r.GetAffectedWorkspaces() != 1 || r.GetSecret().GetName() != "secrets/SHARED" {
			t.Errorf("got %v", r)
		}
		h.WaitGeneration("a", 0)
		h.WaitGeneration("own", 0)
		h.wantEnv("a", "SHARED=first")
		h.wantEnv("own", "SHARED=mine")
		check := func() {
			t.Helper()
			for id, want := range map[string]struct {
				versions map[string]int64
				globals  []string
			}{
				"a":   {map[string]int64{"SHARED": 3, "MINE": 1}, []string{"SHARED"}},
				"own": {map[string]int64{"SHARED": 1}, nil},
			} {
				w := h.get("workspaces/" + id)
				if !maps.Equal(w.GetSecretVersions(), want.versions) || !cmp.Equal(want.globals, w.GetGlobalSecrets()) {
					t.Errorf("%s has %v, global: %v", id, w.GetSecretVersions(), w.GetGlobalSecrets())
				}
			}
		}
		check()
		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		check()
		h.wantVersions("secrets/SHARED", "3*<1, 2, 1")
	})
}

// Enabling, disabling and destroying restart nothing, and say what is in the way.
func TestSecretVersionStates(t *testing.T) {
	for _, parent := range []string{"workspaces/versions", "global"} { // a name that is also a part of names
		t.Run(parent, func(t *testing.T) {
			run(t, func(t *testing.T, h *harness) {
				h.create("versions")
				name, generation := "secrets/K", int64(0)
				if parent != "global" {
					name, generation = parent+"/secrets/K", 4
				}
				for _, v := range []string{"1", "22", "333"} {
					h.set(name, v)
				}
				h.WaitGeneration("versions", 0)
				before := h.get("workspaces/versions")
				c, ctx := h.Client, h.ctx()
				disabled := must2(c.DisableSecretVersion(ctx, &workspacev1.DisableSecretVersionRequest{Name: name + "/versions/2"}))(t)
				want := &workspacev1.DisableSecretVersionResponse{
					SecretVersion: &workspacev1.SecretVersion{
						Name: name + "/versions/2", Version: 2, State: workspacev1.SecretVersionState_SECRET_VERSION_STATE_DISABLED,
						SizeBytes: 2, CreateTime: timestamppb.Now(), Delivery: workspacev1.SecretDelivery_SECRET_DELIVERY_SPEC,
					},
					Generation: generation, Changed: true,
				}
				if diff := cmp.Diff(want, disabled, protocmp.Transform(), protocmp.IgnoreFields(&workspacev1.SecretVersion{}, "create_time")); diff != "" {
					t.Error(diff)
				}
				if again := must2(c.DisableSecretVersion(ctx, &workspacev1.DisableSecretVersionRequest{Name: name + "/versions/2"}))(t); again.GetChanged() {
					t.Errorf("again: %v", again)
				}
				h.wantVersions(name, "3*, 2 disabled, 1")
				refused := func(err error, reason string) {
					t.Helper()
					wantCode(t, err, codes.FailedPrecondition, reason)
					subject := detail[*errdetails.PreconditionFailure](err).GetViolations()[0].GetSubject()
					if !strings.HasPrefix(subject, name+"/versions/") || strings.Count(subject, "/versions/") != strings.Count(name, "/versions")+1 {
						t.Errorf("it names %q", subject)
					}
				}
				_, err := c.RollBackSecret(ctx, &workspacev1.RollBackSecretRequest{Name: name, Version: 2})
				refused(err, "SECRET_VERSION_DISABLED")
				_, err = c.DisableSecretVersion(ctx, &workspacev1.DisableSecretVersionRequest{Name: name + "/versions/3"})
				refused(err, "SECRET_VERSION_CURRENT")
				_, err = c.DestroySecretVersion(ctx, &workspacev1.DestroySecretVersionRequest{Name: name + "/versions/3"})
				refused(err, "SECRET_VERSION_CURRENT")
				if enabled := must2(c.EnableSecretVersion(ctx, &workspacev1.EnableSecretVersionRequest{Name: name + "/versions/2"}))(t); !enabled.GetChanged() || enabled.GetGeneration() != generation {
					t.Errorf("enabled: %v", enabled)
				}
				must2(c.DestroySecretVersion(ctx, &workspacev1.DestroySecretVersionRequest{Name: name + "/versions/1", ValidateOnly: true}))(t)
				h.wantVersions(name, "3*, 2, 1")
				if destroyed := must2(c.DestroySecretVersion(ctx, &workspacev1.DestroySecretVersionRequest{Name: name + "/versions/1"}))(t); !destroyed.GetChanged() || destroyed.GetGeneration() != generation {
					t.Errorf("destroyed: %v", destroyed)
				}
				_, err = c.EnableSecretVersion(ctx, &workspacev1.EnableSecretVersionRequest{Name: name + "/versions/1"})
				refused(err, "SECRET_VERSION_DESTROYED")
				_, err = c.RollBackSecret(ctx, &workspacev1.RollBackSecretRequest{Name: name, Version: 1})
				refused(err, "SECRET_VERSION_DESTROYED")
				synctest.Wait()
				if diff := cmp.Diff(before, h.get("workspaces/versions"), protocmp.Transform()); diff != "" {
					t.Errorf("the workspace has changed: %s", diff)
				}
				must2(c.RollBackSecret(ctx, &workspacev1.RollBackSecretRequest{Name: name, Version: 2}))(t)
				h.wantVersions(name, "4*<2, 3, 2, 1 destroyed")
				h.WaitGeneration("versions", 0)
				h.wantEnv("versions", "K=22")
			})
		})
	}
}

func TestListSecretVersions_Pages(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		for i := range 7 { // of which five are kept
			h.set("secrets/K", fmt.Sprint(i))
		}
		h.set("secrets/L", "x")
		var got []int64
		token := ""
		for pages := 1; ; pages++ {
			r := must2(h.Client.ListSecretVersions(h.ctx(), &workspacev1.ListSecretVersionsRequest{Parent: "secrets/K", PageSize: 2, PageToken: token}))(t)
			for _, v := range r.GetSecretVersions() {
				got = append(got, v.GetVersion())
			}
			if token = r.GetNextPageToken(); token == "" {
				if pages != 3 {
					t.Errorf("%d pages", pages)
				}
				break
			}
			_, err := h.Client.ListSecretVersions(h.ctx(), &workspacev1.ListSecretVersionsRequest{Parent: "secrets/L", PageSize: 2, PageToken: token})
			wantCode(t, err, codes.InvalidArgument, "")
		}
		if diff := cmp.Diff([]int64{7, 6, 5, 4, 3}, got); diff != "" {
			t.Error(diff)
		}
	})
}

// A file can be rolled back in a container as it runs; what was a variable in an
// older version can't become one so.
func TestRollBackSecret_Live(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		for i, delivery := range []workspacev1.SecretDelivery{
			workspacev1.SecretDelivery_SECRET_DELIVERY_ENV, workspacev1.SecretDelivery_SECRET_DELIVERY_FILES, workspacev1.SecretDelivery_SECRET_DELIVERY_FILES,
		} {
			must2(h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{
				Name: "secrets/CERT", Payload: &workspacev1.SetSecretRequest_Text{Text: fmt.Sprint(i + 1)}, Delivery: delivery,
			}))(t)
			h.WaitGeneration("w", 0)
		}
		before := h.get("workspaces/w")
		back := &workspacev1.RollBackSecretRequest{Name: "secrets/CERT", Version: 2, Apply: workspacev1.Apply_APPLY_LIVE}
		if r := must2(h.Client.RollBackSecret(h.ctx(), back))(t); !r.GetChanged() || r.GetAffectedWorkspaces() != 1 {
			t.Errorf("got %v", r)
		}
		w := h.WaitGeneration("w", 0)
		if w.GetContainerId() != before.GetContainerId() || w.GetSecretVersions()["CERT"] != 4 || !cmp.Equal(w.GetGlobalSecrets(), []string{"CERT"}) {
			t.Errorf("before %v\nafter %v", before, w)
		}
		if diff := cmp.Diff(map[string]string{"CERT": "2"}, h.Runtime.Files(w.GetContainerId())); diff != "" {
			t.Error(diff)
		}
		back.Version = 1
		_, err := h.Client.RollBackSecret(h.ctx(), back)
		wantCode(t, err, codes.FailedPrecondition, "SECRET_NOT_LIVE")
		back.Apply = workspacev1.Apply_APPLY_NOW
		must2(h.Client.RollBackSecret(h.ctx(), back))(t)
		h.WaitGeneration("w", 0)
		h.wantEnv("w", "CERT=1")
		h.wantVersions("secrets/CERT", "5*<1, 4<2, 3, 2, 1")
	})
}
