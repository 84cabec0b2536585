package e2e

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/cmd/demo/internal/proof"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// identity is what a restart changes.
type identity struct {
	Container string
	PID       int32
	Started   time.Time
	Restarts  int64
	Inside    string // of the program
}

func (s *stage) identity(id string) identity {
	s.t.Helper()
	w := s.get(id)
	return identity{w.ContainerId, w.Pid, w.StartTime.AsTime(), w.RestartCount, s.inside(id, w.ObservedGeneration)["WORKSPACE_GENERATION"]}
}

// Promise 8: the daemon is killed at a random moment after it acknowledged a
// change, over and over. Whatever was acknowledged is in the container that runs
// after the next start; nothing leaks; who had nothing to do was left alone.
func TestContract08_KillNine(t *testing.T) {
	onEach(t, 10*time.Minute, testKillNine)
}

func testKillNine(t *testing.T, s *stage, short bool) {
	kills := 12
	switch {
	case short:
		kills = 6
	case soakTime() > 0:
		kills = 50
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	want := map[string]string{"FIRST": "1"}
	s.create("victim", want)
	s.create("bystander", map[string]string{"MINE": "2"})
	calm := s.settle(2)
	bystander := s.identity("bystander")

	for i := range kills {
		key, value := fmt.Sprintf("KEY_%d", i%7), fmt.Sprintf("value %d", i)
		generation := s.set("victim", key, value)
		want[key] = value
		// A cycle takes some 100 ms: this is before, in the middle of and after it.
		moment := time.NewTimer(time.Duration(random.Int64N(int64(150 * time.Millisecond))))
		select {
		case <-moment.C:
		case <-s.ctx.Done():
			t.Fatal(s.ctx.Err())
		}
		if err := s.Daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		if random.IntN(4) == 0 { // the power fails for containerd too
			if err := s.Daemon.KillContainerd(s.ctx); err != nil {
				t.Fatal(err)
			}
		}
		s.start()
		after := s.wait("victim", generation)
		checkEnv(t, s.inside("victim", after.ObservedGeneration), want)
		if now := s.identity("bystander"); now != bystander {
			t.Fatalf("kill %d: the bystander was restarted: %+v, was %+v", i, now, bystander)
		}
		if i%10 == 9 || i == kills-1 {
			s.settleLike(2, &calm)
		}
	}
	// Adopted, not restarted: nothing was pending at the last kill.
	victim := s.identity("victim")
	if err := s.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.wait("victim", 0)
	if now := s.identity("victim"); now != victim {
		t.Errorf("restarted although its generation was observed: %+v, was %+v", now, victim)
	}
}

// checkEnv checks the secrets among the variables.
func checkEnv(t *testing.T, env, want map[string]string) {
	t.Helper()
	got := maps.Clone(env)
	for _, key := range []string{"PATH", "HOME", "ENVSERVER_SOCKET", "WORKSPACE_ID", "WORKSPACE_UID", "WORKSPACE_GENERATION"} {
		if got[key] == "" {
			t.Errorf("%s is missing", key)
		}
		delete(got, key)
	}
	if err := proof.Compare(want, got); err != nil {
		t.Fatal(err)
	}
}

// SIGTERM ends the daemon and not the containers; the next one adopts them.
func TestShutdownLeavesContainersRunning(t *testing.T) {
	onEach(t, 2*time.Minute, testShutdown)
}

func testShutdown(t *testing.T, s *stage, _ bool) {
	s.create("one", map[string]string{"A": "1"})
	s.create("two", nil)
	calm := s.settle(2)
	one, two := s.identity("one"), s.identity("two")
	if err := s.Daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	for id, was := range map[string]identity{"one": one, "two": two} {
		if err := unix.Kill(int(was.PID), 0); err != nil {
			t.Errorf("process of %s is gone: %v", id, err)
		}
		if env := s.inside(id, 1); env["WORKSPACE_ID"] != id {
			t.Errorf("%s does not serve while the daemon is down: %v", id, env)
		}
	}
	if pid, err := s.Daemon.ContainerdPID(); err == nil {
		t.Errorf("private containerd, pid %d, still runs", pid)
	}
	s.start()
	for id, was := range map[string]identity{"one": one, "two": two} {
		s.wait(id, 0)
		if now := s.identity(id); now != was {
			t.Errorf("%s was restarted: %+v, was %+v", id, now, was)
		}
	}
	s.settleLike(2, &calm)
	// Adopted means: taken care of.
	generation := s.set("one", "A", "2")
	s.wait("one", generation)
	checkEnv(t, s.inside("one", generation), map[string]string{"A": "2"})
}

// A container that ended while the daemon was down is started again, and one
// that was parked is not.
func TestContract11_ParkedOverRestart(t *testing.T) {
	s := newStage(t, 2*time.Minute)
	s.create("parked", nil)
	s.create("died", nil)
	if _, err := s.client().StopWorkspace(s.ctx, &workspacev1.StopWorkspaceRequest{Name: "workspaces/parked"}); err != nil {
		t.Fatal(err)
	}
	isStopped := func(w *workspacev1.Workspace) bool { return w.State == stopped }
	s.until("parked", "STOPPED", isStopped)
	generation := s.set("parked", "LATE", "while parked")
	was := s.get("died")
	if err := s.Daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	s.kill(was, unix.SIGKILL)
	s.start()
	s.until("died", "running again", func(w *workspacev1.Workspace) bool {
		return w.State == workspacev1.WorkspaceState_WORKSPACE_STATE_RUNNING && w.ContainerId != was.ContainerId
	})
	s.settle(1)
	if w := s.get("parked"); !isStopped(w) || w.ContainerId != "" {
		t.Errorf("parked is %v", w)
	}
	resp, err := s.client().StartWorkspace(s.ctx, &workspacev1.StartWorkspaceRequest{Name: "workspaces/parked"})
	if err != nil {
		t.Fatal(err)
	}
	if resp.Generation <= generation {
		t.Errorf("start is generation %d, the change while parked was %d", resp.Generation, generation)
	}
	s.wait("parked", resp.Generation)
	checkEnv(t, s.inside("parked", resp.Generation), map[string]string{"LATE": "while parked"})
}
