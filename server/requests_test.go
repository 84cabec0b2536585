package server_test

import (
	"context"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// changes calls every change under a request id. The variant is part of the
// payload.
func changes(h *harness, requestID string) map[string]func(variant string) (proto.Message, error) {
	const name = "workspaces/w"
	ctx, c := h.ctx(), h.Client
	return map[string]func(string) (proto.Message, error){
		"CreateWorkspace": func(v string) (proto.Message, error) {
			return c.CreateWorkspace(ctx, &createReq{RequestId: requestID, Workspace: &ws{Spec: spec(), Labels: map[string]string{"a": v, "b": "c", "d": "e"}}, Secrets: []*secret{text("A", v)}})
		},
		"UpdateWorkspace": func(v string) (proto.Message, error) {
			return c.UpdateWorkspace(ctx, &updateReq{RequestId: requestID, Workspace: &ws{Name: name, Labels: map[string]string{"x": v}}})
		},
		"DeleteWorkspace": func(v string) (proto.Message, error) {
			return c.DeleteWorkspace(ctx, &workspacev1.DeleteWorkspaceRequest{RequestId: requestID, Name: "workspaces/doomed", KeepVolumes: v == "1"})
		},
		"RestartWorkspace": func(v string) (proto.Message, error) {
			return c.RestartWorkspace(ctx, &workspacev1.RestartWorkspaceRequest{RequestId: requestID, Name: "workspaces/w" + v})
		},
		"StopWorkspace": func(v string) (proto.Message, error) {
			return c.StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{RequestId: requestID, Name: "workspaces/w" + v})
		},
		"StartWorkspace": func(v string) (proto.Message, error) {
			return c.StartWorkspace(ctx, &workspacev1.StartWorkspaceRequest{RequestId: requestID, Name: "workspaces/parked" + v})
		},
		"SetModel": func(v string) (proto.Message, error) {
			return c.SetModel(ctx, &workspacev1.SetModelRequest{RequestId: requestID, Name: name, Model: v})
		},
		"SetSecret": func(v string) (proto.Message, error) {
			return c.SetSecret(ctx, &workspacev1.SetSecretRequest{RequestId: requestID, Name: name + "/secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: v}})
		},
		"DeleteSecret": func(v string) (proto.Message, error) {
			return c.DeleteSecret(ctx, &workspacev1.DeleteSecretRequest{RequestId: requestID, Name: name + "/secrets/OLD" + v})
		},
		"RollBackSecret": func(v string) (proto.Message, error) {
			version, _ := strconv.ParseInt(v, 10, 64)
			return c.RollBackSecret(ctx, &workspacev1.RollBackSecretRequest{RequestId: requestID, Name: name + "/secrets/VERSIONS", Version: version})
		},
		"EnableSecretVersion": func(v string) (proto.Message, error) {
			return c.EnableSecretVersion(ctx, &workspacev1.EnableSecretVersionRequest{RequestId: requestID, Name: name + "/secrets/DISABLED/versions/" + v})
		},
		"DisableSecretVersion": func(v string) (proto.Message, error) {
			return c.DisableSecretVersion(ctx, &workspacev1.DisableSecretVersionRequest{RequestId: requestID, Name: name + "/secrets/VERSIONS/versions/" + v})
		},
		"DestroySecretVersion": func(v string) (proto.Message, error) {
			return c.DestroySecretVersion(ctx, &workspacev1.DestroySecretVersionRequest{RequestId: requestID, Name: name + "/secrets/VERSIONS/versions/" + v})
		},
		"BatchUpdateSecrets": func(v string) (proto.Message, error) {
			return c.BatchUpdateSecrets(ctx, &workspacev1.BatchUpdateSecretsRequest{RequestId: requestID, Parent: name, Secrets: []*secret{text("B", v)}})
		},
	}
}

func (h *harness) forChanges() {
	h.create("w", func(r *createReq) { r.Secrets = []*secret{text("OLD1", "x"), text("OLD2", "x")} })
	for _, v := range []string{"1", "2", "3"} {
		h.set("workspaces/w/secrets/VERSIONS", v)
		h.set("workspaces/w/secrets/DISABLED", v)
	}
	for _, v := range []string{"1", "2"} {
		must2(h.Client.DisableSecretVersion(h.ctx(), &workspacev1.DisableSecretVersionRequest{Name: "workspaces/w/secrets/DISABLED/versions/" + v}))(h.t)
	}
	for _, id := range []string{"w1", "w2", "doomed", "parked1", "parked2"} {
		h.create(id)
	}
	for _, id := range []string{"parked1", "parked2"} {
		must2(h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: "workspaces/" + id}))(h.t)
	}
}

// TestRequestIDs: the same request again gives the same answer and changes
// nothing, also after a restart, for an hour; another one is refused.
func TestRequestIDs(t *testing.T) {
	var rpcs []string
	run(t, func(t *testing.T, h *harness) {
		for rpc := range changes(h, "") {
			rpcs = append(rpcs, rpc)
		}
	})
	for _, rpc := range rpcs {
		t.Run(rpc, func(t *testing.T) {
			run(t, func(t *testing.T, h *harness) {
				h.forChanges()
				call := changes(h, "id-1")[rpc]
				first := must2(call("1"))(t)
				same := func() {
					t.Helper()
					h.wantUnchanged(func() {
						again, err := call("1")
						if err != nil {
							t.Fatal(err)
						}
						if diff := cmp.Diff(first, again, protocmp.Transform()); diff != "" {
							t.Error(diff)
						}
					})
				}
				same()
				h.wantUnchanged(func() {
					_, err := call("2")
					wantCode(t, err, codes.InvalidArgument, "REQUEST_ID_REUSED")
					if fields(err)["request_id"] == "" {
						t.Errorf("fields: %v", fields(err))
					}
				})
				if err := h.Restart(); err != nil {
					t.Fatal(err)
				}
				advance(59 * time.Minute)
				same()
				advance(2 * time.Minute)
				if _, err := call("2"); codeOf(err) == codes.InvalidArgument {
					t.Errorf("after an hour: %v", err)
				}
			})
		})
	}
}

// TestRequestIDIsTakenByOneOfMany: of 20 equal requests at once one is done and
// all have its answer.
func TestRequestIDIsTakenByOneOfMany(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				resp, err := h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/w", RequestId: "one"})
				if err != nil || resp.GetGeneration() != 2 || !resp.GetChanged() {
					t.Errorf("got %v, %v", resp, err)
				}
			})
		}
		wg.Wait()
		if w := h.WaitGeneration("w", 0); w.GetGeneration() != 2 || w.GetRestartCount() != 1 {
			t.Errorf("got %v", w)
		}
	})
}

// TestContract14_CallerThatGoesAwayCancelsNothing: what was committed happens,
// and the request can be asked for again.
func TestContract14_CallerThatGoesAwayCancelsNothing(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		gate := h.HoldCycle("w")
		ctx, cancel := context.WithCancel(h.ctx())
		set := func(ctx context.Context) (*workspacev1.SetSecretResponse, error) {
			return h.Client.SetSecret(ctx, &workspacev1.SetSecretRequest{
				Name: "workspaces/w/secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: "x"}, RequestId: "r",
			})
		}
		waited := make(chan error, 1)
		if _, err := set(ctx); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := h.Client.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/w"})
			waited <- err
		}()
		if err := gate.Wait(h.ctx()); err != nil {
			t.Fatal(err)
		}
		cancel() // the cycle is in flight
		wantCode(t, <-waited, codes.Canceled, "")
		synctest.Wait()
		gate.Release()
		h.WaitGeneration("w", 2)
		h.wantEnv("w", "A=x")
		again := must2(set(h.ctx()))(t)
		if again.GetGeneration() != 2 || !again.GetChanged() {
			t.Errorf("asked again: %v", again)
		}
	})
}

// TestContract14_BusyIsNoError: calls during a cycle are taken, and join in one
// more.
func TestContract14_BusyIsNoError(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		gate := h.Runtime.Hold("Start", "w") // its snapshot was read
		h.set("workspaces/w/secrets/A", "0")
		if err := gate.Wait(h.ctx()); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 30 {
			wg.Go(func() {
				_, err := h.Client.RestartWorkspace(h.ctx(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/w"})
				if err != nil {
					t.Errorf("restart: %v", err)
				}
			})
		}
		wg.Wait()
		gate.Release()
		if w := h.WaitGeneration("w", 0); w.GetGeneration() != 32 || w.GetRestartCount() != 2 {
			t.Errorf("generation %d after %d restarts", w.GetGeneration(), w.GetRestartCount())
		}
	})
}

// TestRequestThatFoundNothing: a deletion of what was not there is done, and done
// it stays when it is repeated.
func TestRequestThatFoundNothing(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		req := &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/w", AllowMissing: true, RequestId: "once"}
		must2(h.Client.DeleteWorkspace(h.ctx(), req))(t)
		h.create("w")
		if again := must2(h.Client.DeleteWorkspace(h.ctx(), req))(t); again.GetWorkspace() != nil || again.GetChanged() {
			t.Errorf("repeated: %v", again)
		}
		if w := h.get("workspaces/w"); w.GetState() == workspacev1.WorkspaceState_WORKSPACE_STATE_DELETING {
			t.Error("it is being deleted")
		}
	})
}
