package daemon

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/store"
)

type harness struct {
	cfg    Config
	daemon *Daemon
	client workspacev1.WorkspaceControlClient
}

func run(t *testing.T, test func(t *testing.T, h *harness)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := &harness{cfg: Config{
			Dir: t.TempDir(), Runtime: runtimetest.NewFake(runtimetest.AllowAnyImage()), Logger: slog.New(slog.DiscardHandler),
		}}
		h.boot(t)
		conn, err := grpc.NewClient("passthrough:///workspaced", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return h.daemon.Dial(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		h.client = workspacev1.NewWorkspaceControlClient(conn)
		test(t, h)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		if err := h.daemon.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
}

func (h *harness) boot(t *testing.T) {
	t.Helper()
	var err error
	if h.daemon, err = Start(h.cfg); err != nil {
		t.Fatal(err)
	}
}

func (h *harness) kill(t *testing.T) {
	t.Helper()
	h.daemon.Kill()
	h.daemon.Kill() // again is fine
	if err := h.daemon.Wait(); err != nil {
		t.Fatal(err)
	}
}

func (h *harness) create(ctx context.Context, id string) (int64, error) {
	resp, err := h.client.CreateWorkspace(ctx, &workspacev1.CreateWorkspaceRequest{
		WorkspaceId: id, Workspace: &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{Image: "any"}},
	})
	return resp.GetGeneration(), err
}

func (h *harness) exists(t *testing.T, id string) bool {
	t.Helper()
	_, err := h.daemon.Store.Workspace(id)
	return err == nil
}

// What was not committed when the daemon was killed never is; what was, stays.
func TestKillInACommit(t *testing.T) {
	for _, committed := range []bool{false, true} {
		run(t, func(t *testing.T, h *harness) {
			if _, err := h.create(t.Context(), "before"); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // it runs: at boot nothing is committed
			h.kill(t)
			arrived, release := make(chan struct{}), make(chan struct{})
			hold := func() {
				close(arrived)
				<-release
			}
			h.cfg.Around = func(ctx context.Context, step string, do func(context.Context) error) error {
				if step != store.Steps[0] {
					return do(ctx)
				}
				if !committed {
					hold()
					return do(ctx)
				}
				err := do(ctx)
				hold()
				return err
			}
			h.boot(t)
			answer := make(chan error, 1)
			go func() {
				_, err := h.create(t.Context(), "w")
				answer <- err
			}()
			<-arrived
			h.daemon.Kill()
			if err := <-answer; status.Code(err) != codes.Unavailable {
				t.Errorf("the caller got %v, want a broken connection", err)
			}
			close(release)
			if err := h.daemon.Wait(); err != nil {
				t.Fatal(err)
			}
			h.cfg.Around = nil
			h.boot(t)
			if !h.exists(t, "before") || h.exists(t, "w") != committed {
				t.Errorf("committed: %t, there: %t", committed, h.exists(t, "w"))
			}
		})
	}
}

// A killed daemon does nothing to containers any more, and its standbys die.
func TestKillInACycle(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		gate := h.cfg.Runtime.Hold(runtimetest.Start, "w")
		if _, err := h.create(t.Context(), "w"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if gate.Held() != 1 {
			t.Fatal("no cycle")
		}
		h.daemon.Kill()
		gate.Release()
		if err := h.daemon.Wait(); err != nil {
			t.Fatal(err)
		}
		if n := len(h.cfg.Runtime.Launches("")); n != 0 {
			t.Errorf("%d containers started after the kill", n)
		}
		if in := h.cfg.Runtime.Instances(); len(in) != 1 || in[0].Phase != runtime.PhaseRemnant {
			t.Errorf("left: %+v", in)
		}
		h.boot(t)
	})
}

// A shutdown lets what is in flight finish, and takes nothing new, until its
// time is up.
func TestShutdown(t *testing.T) {
	for _, inTime := range []bool{true, false} {
		run(t, func(t *testing.T, h *harness) {
			gate := h.cfg.Runtime.Hold(runtimetest.Start, "w")
			if _, err := h.create(t.Context(), "w"); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- h.daemon.Shutdown(ctx) }()
			synctest.Wait()
			if _, err := h.create(t.Context(), "x"); status.Code(err) != codes.Unavailable {
				t.Errorf("while shutting down: %v", err)
			}
			if inTime {
				gate.Release()
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			gate.Release()
			if _, running := h.cfg.Runtime.Running("w"); running != inTime || (ctx.Err() == nil) != inTime {
				t.Errorf("in time: %t, running: %t", inTime, running)
			}
			h.boot(t)
		})
	}
}

// Every step of store and actors passes Config.Around.
func TestAround(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.kill(t)
		in := fault.New()
		h.cfg.Around = in.Around
		h.boot(t)
		if _, err := h.create(t.Context(), "w"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for _, step := range []string{"store.commit", "secrets.late", "status.observed"} {
			if in.Passed()[fault.Point{Step: step, Moment: fault.After}] == 0 {
				t.Errorf("%s was not passed", step)
			}
		}
	})
}
