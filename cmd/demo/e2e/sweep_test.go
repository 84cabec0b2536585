package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"

	"github.com/workspaced/workspaced/cmd/internal/lab"
)

// ctr asks the daemon's private containerd.
func (s *stage) ctr(args ...string) string {
	s.t.Helper()
	cmd := exec.CommandContext(s.ctx, "ctr", append([]string{"--address", s.Daemon.Containerd(), "--namespace", "workspaced"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("ctr %v: %v: %s", args, err, out)
	}
	return string(out)
}

func (s *stage) stop() {
	s.t.Helper()
	if err := s.Daemon.Stop(); err != nil {
		s.t.Fatal(err)
	}
}

// logged waits until the daemon's log says all of the texts.
func (s *stage) logged(texts ...string) {
	s.t.Helper()
	s.poll(s.ctx, func() error {
		b, err := os.ReadFile(s.Daemon.LogFile())
		if err != nil {
			return err
		}
		for _, text := range texts {
			if !strings.Contains(string(b), text) {
				return fmt.Errorf("the log does not say %q", text)
			}
		}
		return nil
	})
}

// copyDatabase copies database and key from one directory to another.
func (s *stage) copyDatabase(from, to string) {
	s.t.Helper()
	for _, name := range []string{"workspaced.db", "workspaced.key"} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, name), b, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

// TestSweep: a daemon whose database was put back to an older state removes the
// containers of workspaces that it does not know, and no one else's. One with a
// new database removes nothing: nothing is its own.
func TestSweep(t *testing.T) {
	s := newStage(t, 4*time.Minute)
	kept := s.create("kept", nil)
	s.stop()
	older := scratch(t)
	s.copyDatabase(s.Daemon.DataDir(), older)
	s.start()
	orphan := s.create("orphan", nil)
	for id, label := range map[string]string{"other": "workspaced/instance-uid=another", "nobodys": "a=b"} {
		s.ctr("containers", "create", "--label", label, lab.DemoImage, id)
	}
	s.stop()
	newest := scratch(t)
	s.copyDatabase(s.Daemon.DataDir(), newest)
	containers := func() string { return s.ctr("containers", "ls", "-q") }
	has := func(when string, want ...string) {
		t.Helper()
		if got := strings.Fields(containers()); len(got) != len(want) {
			t.Errorf("%s: containers %v, want %v", when, got, want)
		}
		for _, id := range want {
			if !strings.Contains(containers(), id) {
				t.Errorf("%s: container %s is gone", when, id)
			}
		}
	}

	for _, name := range []string{"workspaced.db", "workspaced.key"} {
		if err := os.Remove(filepath.Join(s.Daemon.DataDir(), name)); err != nil {
			t.Fatal(err)
		}
	}
	s.start()
	s.logged("the database is new: the sweep removes nothing")
	has("with a new database", kept.ContainerId, orphan.ContainerId, "other", "nobodys")
	s.stop()

	s.copyDatabase(newest, s.Daemon.DataDir())
	s.start()
	for id, was := range map[string]*workspacev1.Workspace{"kept": kept, "orphan": orphan} {
		if now := s.wait(id, 0); now.ContainerId != was.ContainerId || now.Pid != was.Pid {
			t.Errorf("%s was restarted: %v, before %v", id, now, was)
		}
	}
	s.stop()

	s.copyDatabase(older, s.Daemon.DataDir())
	s.start()
	s.logged("removed a container that belongs to no workspace", orphan.ContainerId)
	if now := s.wait("kept", 0); now.ContainerId != kept.ContainerId || now.Pid != kept.Pid {
		t.Errorf("kept was restarted: %v, before %v", now, kept)
	}
	has("with an older database", kept.ContainerId, "other", "nobodys")
	s.logged("are left alone")
	for _, id := range []string{"other", "nobodys"} {
		s.ctr("containers", "rm", id)
	}
	s.settle(1)
}
