package server_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
)

type waited struct {
	w   *ws
	err error
}

// wait waits in the background, and returns once it does.
func (h *harness) wait(ctx context.Context, generation int64) <-chan waited {
	c := make(chan waited, 1)
	go func() {
		resp, err := h.Client.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/w", Generation: generation, Until: workspacev1.WaitCondition_WAIT_CONDITION_READY})
		c <- waited{resp.GetWorkspace(), err}
	}()
	synctest.Wait()
	return c
}

// pending checks that the wait goes on.
func pending(t *testing.T, c <-chan waited) {
	t.Helper()
	synctest.Wait()
	select {
	case got := <-c:
		t.Fatalf("it ended: %v", got)
	default:
	}
}

// TestContract15_Wait: a wait ends when its generation was observed, not before.
func TestContract15_Wait(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		gate := h.Runtime.Hold(runtimetest.Start, "w")
		h.set("workspaces/w/secrets/A", "1")
		if err := gate.Wait(h.ctx()); err != nil {
			t.Fatal(err)
		}
		newest := h.wait(h.ctx(), 0) // that is 2
		h.set("workspaces/w/secrets/A", "2")
		third := h.wait(h.ctx(), 3)
		old := <-h.wait(h.ctx(), 1)
		if old.err != nil || old.w.GetObservedGeneration() != 1 || !old.w.GetReconciling() {
			t.Errorf("one that was observed: %v", old)
		}
		pending(t, newest)
		pending(t, third)
		gate.Step()
		if err := gate.Wait(h.ctx()); err != nil { // the next one
			t.Fatal(err)
		}
		if got := <-newest; got.err != nil || got.w.GetObservedGeneration() != 2 {
			t.Errorf("generation 2: %v", got)
		}
		pending(t, third)
		gate.Release()
		if got := <-third; got.err != nil || got.w.GetObservedGeneration() != 3 {
			t.Errorf("generation 3: %v", got)
		}
	})
}

// TestContract15_WaitEndsWithATypedError: when it can't come about any more.
func TestContract15_WaitEndsWithATypedError(t *testing.T) {
	t.Run("stopped", func(t *testing.T) {
		run(t, func(t *testing.T, h *harness) {
			h.create("w")
			h.HoldCycle("w")
			h.set("workspaces/w/secrets/A", "1")
			c := h.wait(h.ctx(), 0)
			pending(t, c)
			must2(h.Client.StopWorkspace(h.ctx(), &workspacev1.StopWorkspaceRequest{Name: "workspaces/w"}))(t)
			wantCode(t, (<-c).err, codes.FailedPrecondition, "WORKSPACE_STOPPED")
			got := <-h.wait(h.ctx(), 2)
			wantCode(t, got.err, codes.FailedPrecondition, "WORKSPACE_STOPPED")
			v := detail[*errdetails.PreconditionFailure](got.err).GetViolations()
			if len(v) != 1 || v[0].GetSubject() != "workspaces/w" {
				t.Errorf("violations %v", v)
			}
			if got := <-h.wait(h.ctx(), 1); got.err != nil {
				t.Errorf("one that was observed: %v", got.err)
			}
		})
	})
	t.Run("deleting, deleted", func(t *testing.T) {
		run(t, func(t *testing.T, h *harness) {
			h.create("w")
			gate := h.HoldCycle("w")
			removal := h.Runtime.Hold(runtimetest.RemoveWorkspace, "w")
			h.set("workspaces/w/secrets/A", "1")
			c := h.wait(h.ctx(), 2)
			pending(t, c)
			must2(h.Client.DeleteWorkspace(h.ctx(), &workspacev1.DeleteWorkspaceRequest{Name: "workspaces/w"}))(t)
			wantCode(t, (<-c).err, codes.FailedPrecondition, "WORKSPACE_DELETING")
			gate.Release()
			removal.Release()
			synctest.Wait()
			wantCode(t, (<-h.wait(h.ctx(), 2)).err, codes.NotFound, "WORKSPACE_NOT_FOUND")
		})
	})
	t.Run("deadline", func(t *testing.T) {
		run(t, func(t *testing.T, h *harness) {
			h.create("w")
			h.HoldCycle("w")
			h.set("workspaces/w/secrets/A", "1")
			ctx, cancel := context.WithTimeout(h.ctx(), time.Minute)
			defer cancel()
			wantCode(t, (<-h.wait(ctx, 0)).err, codes.DeadlineExceeded, "STILL_WAITING")
			start := time.Now()
			wantCode(t, (<-h.wait(h.ctx(), 0)).err, codes.DeadlineExceeded, "")
			if d := time.Since(start); d != time.Hour {
				t.Errorf("without a deadline it took %v", d)
			}
		})
	})
	t.Run("deadline, and why", func(t *testing.T) {
		run(t, func(t *testing.T, h *harness) {
			h.create("w")
			h.FailCycle("w", "IMAGE_PULL_FAILED", "the registry is on fire")
			h.set("workspaces/w/secrets/A", "1")
			ctx, cancel := context.WithTimeout(h.ctx(), time.Minute)
			defer cancel()
			err := (<-h.wait(ctx, 0)).err
			wantCode(t, err, codes.DeadlineExceeded, "STILL_WAITING")
			for _, want := range []string{"DEGRADED", "IMAGE_PULL_FAILED", "the registry is on fire"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
		})
	})
	t.Run("draining", func(t *testing.T) {
		run(t, func(t *testing.T, h *harness) {
			h.create("w")
			h.HoldCycle("w")
			h.set("workspaces/w/secrets/A", "1")
			c := h.wait(h.ctx(), 0)
			pending(t, c)
			h.Drain()
			err := (<-c).err
			wantCode(t, err, codes.Unavailable, "DRAINING")
			if d := detail[*errdetails.RetryInfo](err).GetRetryDelay().AsDuration(); d <= 0 {
				t.Errorf("retry after %v", d)
			}
		})
	})
	t.Run("retries exhausted", func(t *testing.T) {
		run(t, func(t *testing.T, h *harness) {
			h.Runtime.AddImage("registry.example/ends:1", runtimetest.Image{Commands: map[string]runtimetest.Command{
				"/bin/x": {Exit: &runtime.Exit{Code: 3, Known: true}, Lifetime: time.Second},
			}})
			policy := &workspacev1.CrashPolicy{Restart: workspacev1.CrashRestart_CRASH_RESTART_ON_FAILURE, MaxRetries: 2}
			must2(h.Client.CreateWorkspace(h.ctx(), &createReq{WorkspaceId: "w", Workspace: &ws{
				Spec: &wsSpec{Image: "registry.example/ends:1", Command: []string{"/bin/x"}, CrashPolicy: policy},
			}}))(t)
			if got := <-h.wait(h.ctx(), 1); got.err != nil {
				t.Errorf("it was started: %v", got.err)
			}
			<-time.After(time.Minute) // the bubble's clock
			synctest.Wait()
			w := h.get("workspaces/w")
			if w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_EXHAUSTED || w.GetReconciling() ||
				w.GetLastExit().GetCode() != 3 || w.GetLastError().GetAttempt() != 3 || w.GetLastError().GetNextAttemptTime() != nil {
				t.Errorf("got %v", w)
			}
			for _, generation := range []int64{0, 1} {
				got := <-h.wait(h.ctx(), generation)
				wantCode(t, got.err, codes.FailedPrecondition, "RETRIES_EXHAUSTED")
				if m := got.err.Error(); !strings.Contains(m, "ended 3 times") || !strings.Contains(m, "code 3") {
					t.Errorf("it says %q", m)
				}
			}
			must2(h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{Name: "workspaces/w", Spec: spec()}, UpdateMask: mask("spec.image", "spec.command")}))(t)
			if got := <-h.wait(h.ctx(), 0); got.err != nil || got.w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_RUNNING || got.w.GetLastError() != nil {
				t.Errorf("healed: %v", got)
			}
		})
	})
	t.Run("only a change can help", func(t *testing.T) {
		run(t, func(t *testing.T, h *harness) {
			h.Runtime.AddImage("registry.example/broken:1", runtimetest.Image{
				Commands: map[string]runtimetest.Command{"/bin/x": runtimetest.ExecFailure},
			})
			h.create("w")
			c := must2(h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{
				Name: "workspaces/w", Spec: &wsSpec{Image: "registry.example/broken:1", Command: []string{"/bin/x"}},
			}}))(t)
			got := <-h.wait(h.ctx(), c.GetGeneration())
			wantCode(t, got.err, codes.FailedPrecondition, "WORKSPACE_FAILED")
			if r := detail[*errdetails.ErrorInfo](got.err).GetMetadata()["reason"]; r != "EXEC_FAILED" {
				t.Errorf("reason %q: %v", r, got.err)
			}
			must2(h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{Name: "workspaces/w", Spec: spec()}, UpdateMask: mask("spec")}))(t)
			if w := h.WaitGeneration("w", c.GetGeneration()); w.GetLastError() != nil {
				t.Errorf("healed: %v", w.GetLastError())
			}
		})
	})
}

// TestWaitGoesOnWhileAttemptsFail: a failure that is retried is no answer; the
// workspace shows it, and the wait ends when it has healed.
func TestWaitGoesOnWhileAttemptsFail(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		heal := h.FailCycle("w", runtime.ReasonImagePullFailed, "the registry is on fire")
		h.set("workspaces/w/secrets/A", "1")
		c := h.wait(h.ctx(), 0)
		pending(t, c)
		w := h.get("workspaces/w")
		e := w.GetLastError()
		if w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_DEGRADED || e.GetReason() != "IMAGE_PULL_FAILED" ||
			e.GetMessage() != "the registry is on fire" || e.GetGeneration() != 2 || e.GetAttempt() != 1 || !e.GetNextAttemptTime().IsValid() {
			t.Errorf("got %v", w)
		}
		heal()
		if got := <-c; got.err != nil || got.w.GetLastError() != nil || got.w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_RUNNING {
			t.Errorf("got %v", got)
		}
	})
}
