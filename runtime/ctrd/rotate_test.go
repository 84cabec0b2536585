package ctrd_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
)

// A process sees its files change: all of them at once, before the signal, and it is
// the same process.
func TestRotate_SeenByTheProcess(t *testing.T) {
	c := ctrdtest.StartContainerd(t, ctrdtest.System)
	b := newBench(t, c)
	files := func(i int64) []runtime.File {
		return []runtime.File{{Name: "A", Data: fmt.Append(nil, i)}, {Name: "B", Data: fmt.Append(nil, i)}}
	}
	s := spec("rotate")
	s.User, s.ReadOnlyRoot = ctrdtest.UserName, true
	in, err := b.d.Start(b.ctx(), b.prepare(s).ID, runtime.Launch{Generation: 1, Files: files(1)})
	if err != nil {
		t.Fatal(err)
	}
	ctrdtest.AwaitReady(t, in.PID)
	const last = 50
	for i := int64(2); i <= last; i++ {
		if i == last/2 { // another daemon
			b.d.Close()
			b.d = b.e.NewDriver(t, nil)
		}
		rotated, err := b.d.Rotate(b.ctx(), in.ID, runtime.Rotation{Generation: i, Files: files(i), Signal: syscall.SIGHUP})
		if err != nil || rotated.PID != in.PID || rotated.Generation != i {
			t.Fatalf("Rotate = %+v, %v", rotated, err)
		}
	}
	want := fmt.Sprintf("pid 1 has %d torn 0 read true\n", last)
	ctrdtest.Eventually(t, "the process has heard of the last files", func() bool { return strings.HasSuffix(b.log(), want) })
	if n := strings.Count(b.log(), "pid 1 has "); n < 1 || n >= last || strings.Contains(b.log(), "no such file") {
		t.Errorf("%d signals for %d rotations: %s", n, last-1, b.log())
	}
	b.checkFiles(in, ctrdtest.UserID, ctrdtest.GroupID, map[string]string{"A": fmt.Sprint(last), "B": fmt.Sprint(last)})

	// One of an older version of this program has no such directory.
	dir := filepath.Join(b.e.StateDir, "instances", b.e.InstanceUID, "uid-w", in.ID, "files")
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	_, err = b.d.Rotate(b.ctx(), in.ID, runtime.Rotation{Generation: last + 1, Files: files(last + 1)})
	var re *runtime.Error
	if !errors.As(err, &re) || !re.Permanent {
		t.Errorf("without its directory: %v", err)
	}
	b.nothingLeft()
}
