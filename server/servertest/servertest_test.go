package servertest_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/servertest"
)

func create(t *testing.T, s *servertest.Server, id, image string) *workspacev1.Workspace {
	t.Helper()
	resp, err := s.Client.CreateWorkspace(t.Context(), &workspacev1.CreateWorkspaceRequest{
		WorkspaceId: id,
		Workspace:   &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{Image: image}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetWorkspace()
}

func restart(t *testing.T, s *servertest.Server, id string) int64 {
	t.Helper()
	resp, err := s.Client.RestartWorkspace(t.Context(), &workspacev1.RestartWorkspaceRequest{Name: "workspaces/" + id})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetGeneration()
}

// Without a bubble, as most tests are.
func TestNew(t *testing.T) {
	s := servertest.New(t)
	w := create(t, s, "w", "any/image")
	if got := s.WaitGeneration(w.GetName(), 0); got.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_RUNNING {
		t.Errorf("got %v", got)
	}
	if got := s.WaitGeneration("w", restart(t, s, "w")); got.GetObservedGeneration() != 2 {
		t.Errorf("got %v", got)
	}
}

func TestHoldAndFailCycle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := servertest.New(t)
		for _, id := range []string{"w", "other"} {
			create(t, s, id, "any/image")
			s.WaitGeneration(id, 1)
		}
		gate := s.HoldCycle("workspaces/w")
		generation := restart(t, s, "w")
		if err := gate.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.WaitGeneration("other", restart(t, s, "other")) // only the one is held
		synctest.Wait()
		get := func() *workspacev1.Workspace {
			resp, err := s.Client.GetWorkspace(t.Context(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/w"})
			if err != nil {
				t.Fatal(err)
			}
			return resp.GetWorkspace()
		}
		if w := get(); w.GetObservedGeneration() != 1 || !w.GetReconciling() {
			t.Errorf("held: %v", w)
		}
		gate.Release()
		s.WaitGeneration("w", generation)

		heal := s.FailCycle("w", runtime.ReasonVolume, "no such disk")
		generation = restart(t, s, "w")
		synctest.Wait()
		if w := get(); w.GetLastError().GetReason() != "VOLUME_UNAVAILABLE" || w.GetLastError().GetMessage() != "no such disk" ||
			w.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_DEGRADED {
			t.Errorf("failed: %v", w)
		}
		heal()
		if w := s.WaitGeneration("w", generation); w.GetLastError() != nil {
			t.Errorf("healed: %v", w)
		}
	})
}

func TestRestartKeepsStateAndContainers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := servertest.New(t)
		create(t, s, "w", "any/image")
		before := s.WaitGeneration("w", 1)
		for range 3 {
			if err := s.Restart(); err != nil {
				t.Fatal(err)
			}
		}
		after := s.WaitGeneration("w", 1)
		if before.GetUid() != after.GetUid() || before.GetContainerId() != after.GetContainerId() {
			t.Errorf("from %v to %v", before, after)
		}
		if n := len(s.Runtime.Launches("w")); n != 1 {
			t.Errorf("started %d times", n)
		}
		s.WaitGeneration("w", restart(t, s, "w"))
	})
}

func TestOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := runtimetest.NewFake()
		fake.AddImage("known/image", runtimetest.Image{Cmd: []string{"/app"}, Env: []string{"FROM=image"}})
		var log bytes.Buffer
		s := servertest.New(t, servertest.WithRuntime(fake), servertest.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		create(t, s, "w", "known/image")
		if env := s.Runtime.Env(s.WaitGeneration("w", 1).GetContainerId()); !strings.Contains(strings.Join(env, " "), "FROM=image") {
			t.Errorf("env %q", env)
		}
		create(t, s, "x", "unknown/image")
		synctest.Wait()
		resp, err := s.Client.GetWorkspace(t.Context(), &workspacev1.GetWorkspaceRequest{Name: "workspaces/x"})
		if err != nil || resp.GetWorkspace().GetLastError().GetReason() != "IMAGE_NOT_FOUND" {
			t.Errorf("got %v, %v", resp, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if !strings.Contains(log.String(), "CreateWorkspace") {
			t.Errorf("log %q", log.String())
		}
	})
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := servertest.New(t)
		s.Drain()
		_, err := s.Client.CreateWorkspace(t.Context(), &workspacev1.CreateWorkspaceRequest{
			Workspace: &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{Image: "any/image"}},
		})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
	})
}

// TestCloseLeavesNothing: no files, and no goroutines even with a cycle held, a
// wait and a watch under way.
func TestCloseLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	goroutines := goruntime.NumGoroutine()
	s, err := servertest.Start()
	if err != nil {
		t.Fatal(err)
	}
	create(t, s, "w", "any/image")
	s.WaitGeneration("w", 1)
	gate := s.HoldCycle("w")
	restart(t, s, "w")
	if err := gate.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	stream, err := s.Client.WatchWorkspaces(t.Context(), &workspacev1.WatchWorkspacesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() {
		_, err := s.Client.WaitWorkspace(t.Context(), &workspacev1.WaitWorkspaceRequest{Name: "workspaces/w"})
		waited <- err
	}()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := <-waited; err == nil {
		t.Error("the wait came to a good end")
	}
	if left, err := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	// gRPC's last goroutines end a moment after its Close.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for goruntime.NumGoroutine() > goroutines {
		if ctx.Err() != nil {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines more:\n%s", goruntime.NumGoroutine()-goroutines, stacks[:goruntime.Stack(stacks, true)])
		}
		goruntime.Gosched()
	}
}

// TestWaitGenerationFailsTheTest when it can't come about.
func TestWaitGenerationFailsTheTest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := &recorder{TB: t}
		s := servertest.New(tb)
		create(t, s, "w", "any/image")
		if _, err := s.Client.StopWorkspace(t.Context(), &workspacev1.StopWorkspaceRequest{Name: "workspaces/w"}); err != nil {
			t.Fatal(err)
		}
		for _, generation := range []int64{0, 7} {
			tb.fatal = ""
			s.WaitGeneration("none", generation)
			if !strings.Contains(tb.fatal, "none") {
				t.Errorf("got %q", tb.fatal)
			}
		}
	})
}

// recorder is a testing.TB whose Fatalf does not end the test.
type recorder struct {
	testing.TB
	fatal string
}

func (r *recorder) Fatalf(format string, args ...any) { r.fatal = fmt.Sprintf(format, args...) }
