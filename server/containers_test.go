package server_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/servertest"
)

func withAPI(r *createReq) { r.Workspace.Spec.WorkspaceApi = true }

// token is that of the container that runs, from its environment.
func (h *harness) containerToken(id string) string {
	h.t.Helper()
	for _, kv := range h.env(id) {
		if token, ok := strings.CutPrefix(kv, "WORKSPACE_TOKEN="); ok {
			return token
		}
	}
	h.t.Fatalf("%s has no token: %q", id, h.env(id))
	return ""
}

func (h *harness) asContainer(token string) workspacev1.WorkspaceControlClient {
	h.t.Helper()
	return must2(h.AsContainer(token))(h.t).Client
}

func fetchReq(id string, keys ...string) *workspacev1.FetchSecretsRequest {
	return &workspacev1.FetchSecretsRequest{Name: "workspaces/" + id, Keys: keys}
}

// values are what a container fetches: own or global, version, value.
func values(r *workspacev1.FetchSecretsResponse) map[string]string {
	m := make(map[string]string)
	for _, s := range r.GetSecrets() {
		scope := strings.ToLower(strings.TrimPrefix(s.GetScope().String(), "SECRET_SCOPE_"))
		m[s.GetKey()] = fmt.Sprintf("%s %d %s", scope, s.GetVersion(), s.GetValue())
	}
	return m
}

// A container reads how its workspace does and its secrets, and nothing else.
func TestContainer_OnlyItself(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.set("secrets/G", "global")
		h.set("secrets/BOTH", "global")
		h.create("a", withAPI, func(r *createReq) {
			r.Workspace.Labels = map[string]string{"team": "x"}
			r.Secrets = []*secret{text("K", "own"), text("BOTH", "own")}
		})
		h.create("b", withAPI)
		h.create("plain")
		h.wantEnv("a", "WORKSPACE_API=unix:///run/workspaced/api/api.sock")
		if l := h.Runtime.Launches("a"); !l[0].Spec.API {
			t.Error("the container does not see the socket")
		}
		if l := h.Runtime.Launches("plain"); l[0].Spec.API || slices.ContainsFunc(l[0].Env, func(kv string) bool {
			return strings.HasPrefix(kv, "WORKSPACE_TOKEN=") || strings.HasPrefix(kv, "WORKSPACE_API=")
		}) {
			t.Errorf("one that was not asked for: %q", l[0].Env)
		}
		c := h.asContainer(h.containerToken("a"))

		h.get("workspaces/a") // whom the answer is made for first
		w := must2(c.GetWorkspace(h.ctx(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/a"}))(t).GetWorkspace()
		if w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_RUNNING || w.GetUid() == "" || w.GetSecretVersions()["K"] != 1 {
			t.Errorf("got %v", w)
		}
		if w.GetSpec() != nil || w.GetLabels() != nil || w.GetEtag() != "" || w.GetPid() != 0 || w.GetContainerId() != "" {
			t.Errorf("it sees what is the operators': %v", w)
		}
		must2(c.WaitWorkspace(h.ctx(), &workspacev1.WaitWorkspaceRequest{Name: "workspaces/a"}))(t)

		r := must2(c.FetchSecrets(h.ctx(), fetchReq("a")))(t)
		if diff := cmp.Diff(map[string]string{"K": "workspace 1 own", "BOTH": "workspace 1 own", "G": "global 1 global"}, values(r)); diff != "" {
			t.Error(diff)
		}
		if r.GetGeneration() != 1 || r.GetObservedGeneration() != 1 {
			t.Errorf("got generations %d, %d", r.GetGeneration(), r.GetObservedGeneration())
		}
		r = must2(c.FetchSecrets(h.ctx(), fetchReq("a", "G")))(t)
		if diff := cmp.Diff(map[string]string{"G": "global 1 global"}, values(r)); diff != "" {
			t.Error(diff)
		}
		_, err := c.FetchSecrets(h.ctx(), fetchReq("a", "K", "NONE"))
		wantCode(t, err, codes.NotFound, server.ReasonSecretNotFound)
		must2(h.Client.SetModel(h.ctx(), &workspacev1.SetModelRequest{Name: "workspaces/b", Model: "m"}))(t)
		h.set("secrets/MODEL_PROVIDER", "hidden")
		synctest.Wait()
		r = must2(h.asContainer(h.containerToken("b")).FetchSecrets(h.ctx(), fetchReq("b")))(t)
		if diff := cmp.Diff(map[string]string{"G": "global 1 global", "BOTH": "global 1 global"}, values(r)); diff != "" {
			t.Error(diff)
		}

		c = h.asContainer(h.containerToken("a")) // the global secret has made another
		for what, call := range map[string]func() error{
			"another's secrets": func() error { _, err := c.FetchSecrets(h.ctx(), fetchReq("b")); return err },
			"another": func() error {
				_, err := c.GetWorkspace(h.ctx(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/b"})
				return err
			},
			"its heartbeat": func() error {
				_, err := c.Heartbeat(h.ctx(), &workspacev1.HeartbeatRequest{Name: "workspaces/b"})
				return err
			},
			"all": func() error { _, err := c.ListWorkspaces(h.ctx(), &workspacev1.ListWorkspacesRequest{}); return err },
			"a change of its own": func() error {
				_, err := c.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{Name: "workspaces/a/secrets/K", Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}})
				return err
			},
			"its own metadata": func() error {
				_, err := c.ListSecrets(h.ctx(), &workspacev1.ListSecretsRequest{Parent: "workspaces/a"})
				return err
			},
		} {
			if code := codeOf(call()); code != codes.PermissionDenied {
				t.Errorf("%s: %v", what, code)
			}
		}
		_, err = must2(h.AsContainer(h.containerToken("a")))(t).Admin.GetServerInfo(h.ctx(), &workspacev1.GetServerInfoRequest{})
		wantCode(t, err, codes.Unimplemented, "")
	})
}

// Who is no container gets no values, whatever else he may do: not an admin, not
// the role without a container, not a container's token where others connect.
func TestContract17_OnlyTheContainerGetsValues(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a", withAPI, func(r *createReq) { r.Secrets = []*secret{text("K", "v")} })
		_, err := h.Client.FetchSecrets(h.ctx(), fetchReq("a"))
		wantCode(t, err, codes.PermissionDenied, server.ReasonRoleMissing)
		role := access.Subject{Name: "x", Grants: []access.Grant{{Roles: access.RolesOf(workspacev1.Role_ROLE_WORKSPACE)}}}
		_, err = must2(h.As(role))(t).Client.FetchSecrets(h.ctx(), fetchReq("a"))
		wantCode(t, err, codes.FailedPrecondition, server.ReasonNoContainer)
		_, err = must2(h.As(role))(t).Client.Heartbeat(h.ctx(), &workspacev1.HeartbeatRequest{Name: "workspaces/a"})
		wantCode(t, err, codes.FailedPrecondition, server.ReasonNoContainer)

		token := h.containerToken("a")
		for _, bad := range []string{"", "x", token[:len(token)-1], token + "x", "wsi_b" + token[len("wsi_a"):], strings.Replace(token, "wsi_", "wsd_", 1)} {
			for range 2 {
				_, err := h.asContainer(bad).GetWorkspace(h.ctx(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/a"})
				if code := codeOf(err); code != codes.Unauthenticated {
					t.Errorf("token %q: %v", bad, err)
				}
			}
		}
		if s := h.log.String(); strings.Contains(s, token) {
			t.Error("the token is in the log")
		}
	})
}

// A token lives as long as its container, and no longer; a daemon that starts anew
// changes nothing about it.
func TestContainer_TokenLifetime(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		const name = "workspaces/a"
		h.create("a", withAPI, func(r *createReq) { r.Secrets = []*secret{text("K", "1")} })
		valid := func(token string, want bool) {
			t.Helper()
			_, err := h.asContainer(token).GetWorkspace(h.ctx(), &workspacev1.GetWorkspaceRequest{Name: name})
			if got := codeOf(err); got != map[bool]codes.Code{true: codes.OK, false: codes.Unauthenticated}[want] {
				t.Errorf("token valid: %v, want %t", err, want)
			}
			_, err = h.asContainer(token).FetchSecrets(h.ctx(), fetchReq("a"))
			if got := codeOf(err); got != map[bool]codes.Code{true: codes.OK, false: codes.Unauthenticated}[want] {
				t.Errorf("fetch: %v, want %t", err, want)
			}
		}
		first := h.containerToken("a")
		valid(first, true)

		// While the next one is prepared the old one's counts.
		gate := h.Runtime.Hold(runtimetest.Prepare, "a")
		h.set(name+"/secrets/K", "2")
		synctest.Wait()
		valid(first, true)
		r := must2(h.asContainer(first).FetchSecrets(h.ctx(), fetchReq("a")))(t)
		if r.GetGeneration() != 2 || r.GetObservedGeneration() != 1 || values(r)["K"] != "workspace 2 2" {
			t.Errorf("got %v, %v", values(r), r)
		}
		gate.Release()
		synctest.Wait()
		second := h.containerToken("a")
		valid(first, false)
		valid(second, true)

		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := h.containerToken("a"); got != second {
			t.Error("a restart of the daemon made another container")
		}
		valid(second, true)

		// A failed cycle takes nothing from the one that runs.
		heal := h.FailCycle("a", runtime.ReasonImagePullFailed, "no")
		h.set(name+"/secrets/K", "3")
		synctest.Wait()
		valid(second, true)
		heal()
		h.WaitGeneration("a", 3)
		third := h.containerToken("a")
		valid(second, false)
		valid(third, true)

		// One that ends by itself.
		in, _ := h.Runtime.Running("a")
		h.Runtime.Exit(in.ID, runtime.Exit{Code: 1, Known: true})
		synctest.Wait()
		valid(third, false)
		advance(time.Minute)
		synctest.Wait()
		fourth := h.containerToken("a")
		valid(fourth, true)

		// Without the setting there is none any more.
		must2(h.Client.UpdateWorkspace(h.ctx(), &workspacev1.UpdateWorkspaceRequest{
			Workspace: &ws{Name: name, Spec: &workspacev1.WorkspaceSpec{}}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec.workspace_api"}},
		}))(t)
		synctest.Wait()
		valid(fourth, false)
		if slices.ContainsFunc(h.env("a"), func(kv string) bool { return strings.HasPrefix(kv, "WORKSPACE_TOKEN=") }) {
			t.Error("there is a token still")
		}
		must2(h.Client.UpdateWorkspace(h.ctx(), &workspacev1.UpdateWorkspaceRequest{
			Workspace:  &ws{Name: name, Spec: &workspacev1.WorkspaceSpec{WorkspaceApi: true, SecretDelivery: workspacev1.SecretDelivery_SECRET_DELIVERY_FILES}},
			UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec.workspace_api", "spec.secret_delivery"}},
		}))(t)
		synctest.Wait()
		launches := h.Runtime.Launches("a")
		last := launches[len(launches)-1]
		i := slices.IndexFunc(last.Files, func(f runtime.File) bool { return f.Name == "WORKSPACE_TOKEN" })
		if i < 0 || slices.ContainsFunc(last.Env, func(kv string) bool { return strings.HasPrefix(kv, "WORKSPACE_TOKEN=") }) {
			t.Fatalf("the token is no file: %q", last.Env)
		}
		fifth := string(last.Files[i].Data)
		valid(fifth, true)

		// Stopped, and deleted; a new workspace of the name is another one.
		must2(h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: name}))(t)
		synctest.Wait()
		valid(fifth, false)
		must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: name}))(t)
		synctest.Wait()
		valid(fifth, false)
		h.create("a", withAPI)
		valid(fifth, false)
	})
}

// While a workspace is being stopped or deleted its container gets no values any
// more, but may see why it is to end.
func TestContainer_EndsWithoutValues(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a", withAPI)
		c := h.asContainer(h.containerToken("a"))
		gate := h.Runtime.Hold(runtimetest.Stop, "a")
		must2(h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: "workspaces/a"}))(t)
		synctest.Wait()
		_, err := c.FetchSecrets(h.ctx(), fetchReq("a"))
		wantCode(t, err, codes.FailedPrecondition, server.ReasonWorkspaceStopped)
		w := must2(c.GetWorkspace(h.ctx(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/a"}))(t).GetWorkspace()
		if !w.GetParked() {
			t.Errorf("got %v", w)
		}
		must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/a"}))(t)
		_, err = c.FetchSecrets(h.ctx(), fetchReq("a"))
		wantCode(t, err, codes.FailedPrecondition, server.ReasonWorkspaceDeleting)
		gate.Release()
	})
}

// A wait of a container ends with it, though its connection stays.
func TestContainer_WaitEndsWithIt(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a", withAPI)
		c := h.asContainer(h.containerToken("a"))
		gate := h.Runtime.Hold(runtimetest.Prepare, "a")
		h.set("workspaces/a/secrets/K", "1")
		h.set("workspaces/a/secrets/K", "2")
		ended := make(chan error, 1)
		go func() {
			_, err := c.WaitWorkspace(h.ctx(), &workspacev1.WaitWorkspaceRequest{Name: "workspaces/a"})
			ended <- err
		}()
		synctest.Wait()
		gate.Release()
		wantCode(t, <-ended, codes.Unauthenticated, server.ReasonTokenInvalid)
	})
}

// A heartbeat is seen, and is no change: it wakes nobody and writes nothing.
func TestHeartbeat(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		const name = "workspaces/a"
		before := h.create("a", withAPI)
		c := h.asContainer(h.containerToken("a"))
		stream := must2(h.Client.WatchWorkspaces(h.ctx(), &workspacev1.WatchWorkspacesRequest{}))(t)
		recvUntil(t, stream, isSynced)
		if got := h.get(name); got.GetLastHeartbeatTime() != nil {
			t.Errorf("before any heartbeat: %v", got)
		}
		var last time.Time
		for range 5 {
			advance(10 * time.Second)
			last = time.Now()
			r := must2(c.Heartbeat(h.ctx(), &workspacev1.HeartbeatRequest{Name: name}))(t)
			if r.GetGeneration() != 1 || r.GetObservedGeneration() != 1 {
				t.Errorf("got %v", r)
			}
		}
		got := h.get(name)
		if !got.GetLastHeartbeatTime().AsTime().Equal(last) || got.GetGeneration() != 1 || got.GetEtag() != before.GetEtag() {
			t.Errorf("got %v, want a heartbeat at %v", got, last)
		}
		list := must2(h.Client.ListWorkspaces(h.ctx(), &workspacev1.ListWorkspacesRequest{}))(t)
		if !list.GetWorkspaces()[0].GetLastHeartbeatTime().AsTime().Equal(last) {
			t.Errorf("got %v", list)
		}
		// What the watcher hears first is the change that is made now.
		h.set(name+"/secrets/K", "v")
		if r := must2(stream.Recv())(t); r.GetWorkspace().GetGeneration() != 2 {
			t.Errorf("the watcher was woken by a heartbeat: %v", r)
		}
		h.WaitGeneration("a", 2)
		if got := h.get(name); got.GetLastHeartbeatTime() != nil {
			t.Errorf("the next container has the heartbeat of the one before: %v", got)
		}
	})
}

// Each fetch is in the audit log, with its keys and without its values, before its
// answer is there; what can't be written down is not answered.
func TestFetchSecrets_Audit(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a", withAPI, func(r *createReq) { r.Secrets = []*secret{text("K", "canary-value"), text("L", "canary-value")} })
		c := h.asContainer(h.containerToken("a"))
		must2(c.FetchSecrets(h.ctx(), fetchReq("a", "L")))(t)
		list := must2(h.Admin.ListAuditEntries(h.ctx(), &workspacev1.ListAuditEntriesRequest{Method: "FetchSecrets"}))(t)
		if len(list.GetAuditEntries()) != 1 {
			t.Fatalf("got %v", list)
		}
		e := list.GetAuditEntries()[0]
		if e.GetSubject() != "workspace:a" || e.GetResource() != "workspaces/a" || e.GetCode() != "OK" || !slices.Equal(e.GetKeys(), []string{"L"}) {
			t.Errorf("got %v", e)
		}
		if strings.Contains(h.log.String()+fmt.Sprint(list), "canary-value") {
			t.Error("a value is in log or audit log")
		}
	})
}

// A hostile container can't fill the audit log.
func TestFetchSecrets_Rate(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a", withAPI)
		h.create("b", withAPI)
		c := h.asContainer(h.containerToken("a"))
		for range 10 {
			must2(c.FetchSecrets(h.ctx(), fetchReq("a")))(t)
		}
		_, err := c.FetchSecrets(h.ctx(), fetchReq("a"))
		wantCode(t, err, codes.ResourceExhausted, server.ReasonTooManyFetches)
		must2(h.asContainer(h.containerToken("b")).FetchSecrets(h.ctx(), fetchReq("b")))(t)
		advance(10 * time.Second)
		must2(c.FetchSecrets(h.ctx(), fetchReq("a")))(t)
		_, err = c.FetchSecrets(h.ctx(), fetchReq("a"))
		wantCode(t, err, codes.ResourceExhausted, server.ReasonTooManyFetches)
	})
}

// Killed at every commit of a cycle, in the middle of it: whatever runs afterwards
// has a token that is valid, and no other is.
func TestContainer_TokenSurvivesCrashes(t *testing.T) {
	for _, at := range []runtimetest.Method{runtimetest.Prepare, runtimetest.Arm, runtimetest.Start, runtimetest.Stop, runtimetest.Remove} {
		for when, hold := range map[string]func(*runtimetest.Fake) *runtimetest.Gate{
			"before": func(f *runtimetest.Fake) *runtimetest.Gate { return f.Hold(at, "a") },
			"after":  func(f *runtimetest.Fake) *runtimetest.Gate { return f.HoldAfter(at, "a") },
		} {
			t.Run(when+" "+string(at), func(t *testing.T) {
				run(t, func(t *testing.T, h *harness) {
					h.create("a", withAPI)
					old := h.containerToken("a")
					gate := hold(h.Runtime)
					h.set("workspaces/a/secrets/K", "v")
					synctest.Wait()
					if err := h.Restart(); err != nil {
						t.Fatal(err)
					}
					gate.Release()
					h.WaitGeneration("a", 2)
					synctest.Wait()
					must2(h.asContainer(h.containerToken("a")).FetchSecrets(h.ctx(), fetchReq("a")))(t)
					_, err := h.asContainer(old).GetWorkspace(h.ctx(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/a"})
					wantCode(t, err, codes.Unauthenticated, server.ReasonTokenInvalid)
				}, servertest.WithPolicy(anything))
			})
		}
	}
}

// What the newest spec can't start leaves the last good one to run again, with a
// token of its own.
func TestContainer_TokenOfTheFallback(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.Runtime.AddImage("bad", runtimetest.Image{Entrypoint: []string{"x"}, Commands: map[string]runtimetest.Command{"x": runtimetest.ExecFailure}})
		h.create("a", withAPI)
		old := h.containerToken("a")
		must2(h.Client.UpdateWorkspace(h.ctx(), &workspacev1.UpdateWorkspaceRequest{
			Workspace: &ws{Name: "workspaces/a", Spec: &workspacev1.WorkspaceSpec{Image: "bad"}}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"spec.image"}},
		}))(t)
		synctest.Wait()
		if w := h.get("workspaces/a"); w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_DEGRADED {
			t.Fatalf("got %v", w)
		}
		must2(h.asContainer(h.containerToken("a")).FetchSecrets(h.ctx(), fetchReq("a")))(t)
		_, err := h.asContainer(old).FetchSecrets(h.ctx(), fetchReq("a"))
		wantCode(t, err, codes.Unauthenticated, server.ReasonTokenInvalid)
	})
}

// Files that change in a container as it runs leave its token where it is.
func TestContainer_TokenStaysWhenFilesChange(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("a", withAPI, func(r *createReq) {
			r.Workspace.Spec.SecretDelivery = workspacev1.SecretDelivery_SECRET_DELIVERY_FILES
			r.Secrets = []*secret{text("K", "1")}
		})
		in, _ := h.Runtime.Running("a")
		token := h.Runtime.Files(in.ID)["WORKSPACE_TOKEN"]
		must2(h.Client.SetSecret(h.ctx(), &workspacev1.SetSecretRequest{
			Name: "workspaces/a/secrets/K", Payload: &workspacev1.SetSecretRequest_Text{Text: "2"}, Apply: workspacev1.Apply_APPLY_LIVE,
		}))(t)
		synctest.Wait()
		if diff := cmp.Diff(map[string]string{"K": "2", "WORKSPACE_TOKEN": token}, h.Runtime.Files(in.ID)); diff != "" || token == "" {
			t.Error(diff)
		}
		r := must2(h.asContainer(token).FetchSecrets(h.ctx(), fetchReq("a")))(t)
		if values(r)["K"] != "workspace 2 2" || r.GetObservedGeneration() != 2 {
			t.Errorf("got %v", r)
		}
	})
}
