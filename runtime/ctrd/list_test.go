package ctrd_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
	"github.com/workspaced/workspaced/runtime/runtimetest"
)

// A shim that hangs is its workspace's trouble: the others are listed, and what
// can't be asked is there, and not taken for dead.
func TestContract13_OneShimHangs(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		of := func(id string) runtime.Spec {
			s := spec()
			s.WorkspaceID, s.WorkspaceUID = id, "uid-"+id
			return s
		}
		// One whose process is gone, and one that runs and has lost its record: of both
		// containerd has to be asked, and that asks the shim.
		ended, lost := b.run(of("w")), b.run(of("lost"))
		if err := os.Remove(filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-lost", lost.ID, "record.json")); err != nil {
			t.Fatal(err)
		}
		shims := c.Shims()
		healthy := b.run(of("healthy"))
		wantPhases := func(want map[string]runtime.Phase, fails bool) {
			t.Helper()
			list, err := b.d.List(b.ctx(), "")
			got := make(map[string]runtime.Phase)
			for _, in := range list {
				got[in.ID] = in.Phase
				if in.WorkspaceUID != "uid-"+in.WorkspaceID || in.PreparedGeneration != 1 {
					t.Errorf("%+v", in)
				}
			}
			if !maps.Equal(got, want) || (err != nil) != fails {
				t.Errorf("List has %v, %v, want %v", got, err, want)
			}
		}
		signal := func(signal syscall.Signal, pids ...int) {
			for _, pid := range pids {
				if err := syscall.Kill(pid, signal); err != nil {
					t.Errorf("signal %v to %d: %v", signal, pid, err)
				}
			}
		}
		running := map[string]runtime.Phase{ended.ID: runtime.PhaseRunning, lost.ID: runtime.PhaseRunning, healthy.ID: runtime.PhaseRunning}
		wantPhases(running, false)
		if len(shims) == 0 {
			t.Fatal("no shim is found")
		}
		signal(syscall.SIGSTOP, shims...)
		ctrdtest.Eventually(t, "the shims stand still", func() bool { return !slices.ContainsFunc(shims, moves) })
		defer func() {
			for _, shim := range shims {
				_ = syscall.Kill(shim, syscall.SIGCONT) // if it is there still
			}
		}()
		// While the process lives nobody has to ask.
		if list, err := b.d.List(b.ctx(), "uid-w"); err != nil || len(list) != 1 || list[0].Phase != runtime.PhaseRunning {
			t.Errorf("with a hung shim: %+v, %v", list, err)
		}
		signal(syscall.SIGKILL, ended.PID)
		ctrdtest.Eventually(t, "the process ends", func() bool { return ctrdtest.Ended(ended.PID) })
		wantPhases(map[string]runtime.Phase{ended.ID: runtime.PhaseUnknown, lost.ID: runtime.PhaseUnknown, healthy.ID: runtime.PhaseRunning}, true)
		if list, err := b.d.List(b.ctx(), "uid-healthy"); err != nil || len(list) != 1 || list[0].Phase != runtime.PhaseRunning {
			t.Errorf("List of the other = %+v, %v", list, err)
		}
		for _, id := range []string{"uid-w", "uid-lost"} {
			if list, err := b.d.List(b.ctx(), id); err == nil {
				t.Errorf("List of one that can't be asked = %+v, and no error", list)
			}
		}
		if exit, err := runtimetest.Wait(b.ctx(), b.d, lost.ID); err == nil {
			t.Errorf("Wait = %+v", exit)
		}

		signal(syscall.SIGCONT, shims...)
		ctrdtest.Eventually(t, "it is known how it ended", func() bool {
			got := b.list()[ended.ID]
			return got.Phase == runtime.PhaseExited && got.Exit.Known && got.Exit.Signal == int(syscall.SIGKILL)
		})
		if ctrdtest.Ended(lost.PID) || ctrdtest.Ended(healthy.PID) {
			t.Error("what ran does not any more")
		}
		ctrdtest.RemoveAll(t, b.d)
		for _, id := range []string{"lost", "healthy"} {
			if err := b.d.RemoveWorkspace(b.ctx(), id, "uid-"+id, false); err != nil {
				t.Error(err)
			}
		}
		b.nothingLeft()
	})
}

// moves tells whether a process has a thread that a SIGSTOP has not reached yet.
func moves(pid int) bool {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(b), ") T ") {
			return true
		}
	}
	return err != nil || len(files) == 0
}

// Of instances that are all on record containerd is asked once. What is not on
// record any more has to be asked for: nothing is taken for dead.
func TestContract13_ListOfWhatIsOnRecord(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		in := b.run(spec())
		runs := func(when string) {
			t.Helper()
			if list, err := b.d.List(b.ctx(), "uid-w"); err != nil || len(list) != 1 || list[0].ID != in.ID || list[0].Phase != runtime.PhaseRunning {
				t.Errorf("%s: List = %+v, %v", when, list, err)
			}
		}
		runs("at first")
		c.Kill(t)
		runs("without containerd")
		dir := filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-w", in.ID)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if list, err := b.d.List(b.ctx(), "uid-w"); err == nil {
			t.Errorf("with its directory gone: List = %+v, and no error", list)
		}
		c.Start(t)
		runs("with its directory gone")
		b.nothingLeft()
	})
}

// A workspace that nobody knows any more, as after an older database was put back,
// is removed container by container: its cgroup goes with the last one.
func TestRemove_TheLastTakesTheWorkspacesCgroup(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		cgroups := func() []string {
			dirs, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/*", b.e.Namespace, "w"))
			unified, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup", b.e.Namespace, "w"))
			if err != nil {
				t.Fatal(err)
			}
			return append(dirs, unified...)
		}
		first, second := b.run(spec()), b.run(spec())
		for _, in := range []runtime.Instance{first, second} {
			if len(cgroups()) == 0 {
				t.Errorf("%s runs, and there is no cgroup of its workspace", in.ID)
			}
			if err := b.d.Remove(b.ctx(), in.ID); err != nil {
				t.Fatal(err)
			}
		}
		if left := cgroups(); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		b.nothingLeft()
	})
}
