package e2e

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// A cycle that hangs in its pull does not keep the daemon from ending: after the
// drain timeout, or at the second signal. The old container stays, the change
// stays pending, callers who wait are told, and the next daemon takes it up.
func TestDrainBreaksOffAHungCycle(t *testing.T) {
	for _, tt := range []struct {
		name    string
		timeout string
		signals int
	}{
		{"drain timeout", "1s", 1},
		{"second signal", "1h", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStage(t, 2*time.Minute, "--drain-timeout="+tt.timeout)
			s.create("one", map[string]string{"A": "1"})
			was := s.identity("one")
			ref, hold, err := s.PushSlow(s.ctx, "slow")
			if err != nil {
				t.Fatal(err)
			}
			defer hold.Release()
			s.update("one", &workspacev1.WorkspaceSpec{Image: ref}, "spec.image")
			generation := s.set("one", "A", "2")
			s.waitFor("the pull", hold.Reached)

			waited := make(chan error, 1)
			client := s.client()
			go func() {
				_, err := client.WaitWorkspace(s.ctx, &workspacev1.WaitWorkspaceRequest{Name: "workspaces/one", Generation: generation})
				waited <- err
			}()
			for i := range tt.signals {
				if err := s.Daemon.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				if i == 0 { // the second one only when the first was heard
					s.poll(s.ctx, func() error {
						if strings.Contains(s.Daemon.LogTail(), "msg=draining") {
							return nil
						}
						return errors.New("the daemon does not drain")
					})
				}
			}
			began := time.Now()
			if err := s.Daemon.WaitStopped(); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("took %v to end", took)
			}
			if err := <-waited; status.Code(err) != codes.Unavailable {
				t.Errorf("the wait ended with %v, want UNAVAILABLE", err)
			}
			if err := syscall.Kill(int(was.PID), 0); err != nil {
				t.Errorf("the old container is gone: %v", err)
			}

			hold.Release()
			s.start()
			w := s.wait("one", generation)
			if w.RestartCount != was.Restarts+1 {
				t.Errorf("%d restarts, were %d before: want one more", w.RestartCount, was.Restarts)
			}
			checkEnv(t, s.inside("one", w.ObservedGeneration), map[string]string{"A": "2"})
			s.settle(1)
		})
	}
}
