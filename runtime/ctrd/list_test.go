package ctrd_test

import (
	"syscall"
	"testing"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
)

// A shim that hangs is its workspace's trouble: the others are listed, and it is
// known to be there.
func TestContract13_OneShimHangs(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		impatient := b.e.NewDriver(t, nil)
		impatient.LimitDeadlines(time.Second)
		in := b.run(spec())
		shims := c.Shims()
		other := spec()
		other.WorkspaceID, other.WorkspaceUID = "other", "uid-other"
		healthy := b.run(other)

		for _, shim := range shims {
			if err := syscall.Kill(shim, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = syscall.Kill(shim, syscall.SIGCONT) }()
		}
		// While its process lives nobody has to ask the shim.
		if got := b.list(); got[in.ID].Phase != runtime.PhaseRunning || got[healthy.ID].Phase != runtime.PhaseRunning {
			t.Errorf("with a hung shim: %+v", got)
		}
		if err := syscall.Kill(in.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		ctrdtest.Eventually(t, "the process ends", func() bool { return ctrdtest.Ended(in.PID) })
		list, err := impatient.List(b.ctx(), "")
		wantReason(t, err, runtime.ReasonTimeout)
		if len(list) != 2 || list[0].ID != in.ID || list[0].Phase != runtime.PhaseUnknown || list[0].WorkspaceUID != "uid-w" ||
			list[0].Generation != 1 || list[0].Exit != nil || list[1].ID != healthy.ID || list[1].Phase != runtime.PhaseRunning {
			t.Errorf("List of all = %+v", list)
		}
		if list, err := impatient.List(b.ctx(), "uid-other"); err != nil || len(list) != 1 || list[0].Phase != runtime.PhaseRunning {
			t.Errorf("List of the other = %+v, %v", list, err)
		}
		if _, err := impatient.List(b.ctx(), "uid-w"); err == nil {
			t.Error("List of the one that can't be asked has no error")
		}

		for _, shim := range shims {
			if err := syscall.Kill(shim, syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
		}
		ctrdtest.Eventually(t, "it is known how it ended", func() bool {
			got := b.list()[in.ID]
			return got.Phase == runtime.PhaseExited && got.Exit.Known && got.Exit.Signal == int(syscall.SIGKILL)
		})
		ctrdtest.RemoveAll(t, b.d)
		if err := b.d.RemoveWorkspace(b.ctx(), "other", "uid-other", false); err != nil {
			t.Error(err)
		}
		b.nothingLeft()
	})
}
