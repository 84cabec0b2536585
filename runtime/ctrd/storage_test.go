package ctrd_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
)

// filler takes what is free in the tmpfs at dir.
type filler struct {
	t    *testing.T
	dir  string
	file *os.File
}

func newFiller(t *testing.T, dir string) *filler {
	f := &filler{t: t, dir: dir}
	f.remount("size=16m")
	var err error
	if f.file, err = os.Create(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *filler) remount(options string) {
	f.t.Helper()
	if err := unix.Mount("workspaced", f.dir, "tmpfs", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		f.t.Fatalf("remount of %s with %s: %v", f.dir, options, err)
	}
}

// fill leaves no byte free.
func (f *filler) fill() {
	f.t.Helper()
	var err error
	for page := make([]byte, 4<<10); err == nil; {
		_, err = f.file.Write(page)
	}
	if !errors.Is(err, unix.ENOSPC) {
		f.t.Fatal(err)
	}
}

// free gives back what was taken, and more.
func (f *filler) free() {
	f.t.Helper()
	if err := errors.Join(f.file.Close(), os.Remove(f.file.Name())); err != nil {
		f.t.Fatal(err)
	}
	f.remount("size=50%")
}

// When the state directory's tmpfs is full: no new instance is begun, and what was
// begun before can be brought to its end.
func TestContract05_StateDirectoryIsFull(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		old := b.run(spec("handled"))
		exited := b.run(spec("handled"))
		b.wantGone(exited)
		large := spec()
		large.LaunchBytes = 64 << 10
		var files []runtime.File
		for i := range 16 {
			files = append(files, runtime.File{Name: fmt.Sprintf("F%d", i), Data: make([]byte, 64<<10)})
			large.FileBytes += runtime.FileSize(files[i])
		}
		standby, spare := b.prepare(large), b.prepare(spec())

		disk := newFiller(t, filepath.Join(b.e.StateDir, "instances"))
		disk.fill()
		_, err := b.d.Prepare(b.ctx(), spec())
		wantReason(t, err, runtime.ReasonStorage, "no space left on device", "record.create", b.e.StateDir)
		if list := b.list(); len(list) != 4 || list[old.ID].Phase != runtime.PhaseRunning {
			t.Errorf("with a full tmpfs there is %+v", list)
		}
		// The switch needs nothing that is not there: its records have their room.
		versions := make(map[string]int64)
		for i := range 300 {
			versions[strings.Repeat("K", 100)+string(rune('a'+i%26))+strings.Repeat("x", i/26)] = int64(i)
		}
		if err := b.d.Arm(b.ctx(), standby.ID, runtime.Launch{Generation: 1, SecretVersions: versions, Files: files}); err != nil {
			t.Fatalf("Arm: %v", err)
		}
		disk.fill()
		b.wantGone(old)
		files = slices.Clone(files) // all is other than what it was armed with
		for i := range files {
			files[i].Data = bytes.Repeat([]byte("x"), len(files[i].Data))
		}
		started, err := b.d.Start(b.ctx(), standby.ID, runtime.Launch{Generation: 2, SecretVersions: versions, Files: files})
		if err != nil {
			t.Fatalf("Start: %v", err)
		}
		if got := b.list()[started.ID]; got.Phase != runtime.PhaseRunning || got.Generation != 2 || len(got.SecretVersions) != len(versions) {
			t.Errorf("what was started is %+v", got)
		}
		// No room for other files: those that are there stay.
		disk.fill()
		_, err = b.d.Rotate(b.ctx(), started.ID, runtime.Rotation{Generation: 3, Files: []runtime.File{{Name: "F0", Data: make([]byte, 64<<10)}, {Name: "F1", Data: []byte("x")}}})
		wantReason(t, err, runtime.ReasonStorage, "no space left on device", "files.write")
		for _, f := range files {
			if got, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s/%s", started.PID, runtime.FilesDir, f.Name)); err != nil || !bytes.Equal(got, f.Data) {
				t.Errorf("%s has %d other bytes, %v", f.Name, len(got), err)
			}
		}
		disk.fill()
		spare, err = b.d.Start(b.ctx(), spare.ID, runtime.Launch{Generation: 2, SecretVersions: map[string]int64{"K": 1}})
		if got := b.list()[spare.ID]; err != nil || got.Generation != 2 {
			t.Errorf("what nobody has armed is %+v, %v", got, err)
		}
		// Removal makes room and needs none.
		disk.fill()
		for _, in := range []runtime.Instance{old, exited, spare} {
			if err := b.d.Remove(b.ctx(), in.ID); err != nil {
				t.Errorf("Remove: %v", err)
			}
		}
		disk.free()
		if _, err := b.d.Prepare(b.ctx(), spec()); err != nil {
			t.Errorf("with room again: %v", err)
		}
		b.nothingLeft()
	})
}

// When the data directory is read-only, or takes no file any more: no new
// instance is begun, the old one runs on, and it heals.
func TestContract05_DataDirectoryFails(t *testing.T) {
	onEach(t, func(t *testing.T, c *ctrdtest.Containerd) {
		b := newBench(t, c)
		b.d.Close()
		// A disk of its own, which can be full.
		if err := unix.Mount("test", b.e.DataDir, "tmpfs", 0, "mode=0755"); err != nil {
			t.Fatal(err)
		}
		b.d = b.e.NewDriver(t, nil)
		old := b.run(spec())
		other := spec() // without a log yet
		other.WorkspaceID, other.WorkspaceUID = "other", "uid-other"
		volume := spec()
		volume.Mounts = []runtime.Mount{{Path: "/data", Volume: "data"}}
		// Shims have logs open: the mount that they have them on can't become read-only,
		// another one at the same place can.
		protect := func() {
			for _, flags := range []uintptr{unix.MS_BIND, unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY} {
				if err := unix.Mount(b.e.DataDir, b.e.DataDir, "", flags, ""); err != nil {
					t.Fatal(err)
				}
			}
		}
		unmount := func() {
			if err := unix.Unmount(b.e.DataDir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
		limit := func(inodes string) {
			if err := unix.Mount("test", b.e.DataDir, "tmpfs", unix.MS_REMOUNT, "nr_inodes="+inodes); err != nil {
				t.Fatal(err)
			}
		}
		for name, disk := range map[string]struct {
			fail, heal func()
			text       string
		}{
			"read-only": {protect, unmount, "read-only file system"},
			"full":      {func() { limit(inodes(t, b.e.DataDir)) }, func() { limit("1000") }, "no space left on device"},
		} {
			disk.fail()
			_, err := b.d.Prepare(b.ctx(), other)
			wantReason(t, err, runtime.ReasonStorage, disk.text, "log.make", b.e.DataDir)
			_, err = b.d.Prepare(b.ctx(), volume)
			// A log that exists can't be opened for writing on a read-only disk.
			if name == "read-only" {
				wantReason(t, err, runtime.ReasonStorage, disk.text)
			} else {
				wantReason(t, err, runtime.ReasonVolume, disk.text, `"data"`)
			}
			if list := b.list(); len(list) != 1 || list[old.ID].Phase != runtime.PhaseRunning {
				t.Errorf("%s: there is %+v", name, list)
			}
			disk.heal()
			for _, s := range []runtime.Spec{other, volume} {
				if err := b.d.Remove(b.ctx(), b.prepare(s).ID); err != nil {
					t.Errorf("%s: Remove: %v", name, err)
				}
				if s.WorkspaceID == "other" {
					if err := b.d.RemoveWorkspace(b.ctx(), "other", "uid-other", false); err != nil {
						t.Error(err)
					}
				}
			}
			if err := os.RemoveAll(filepath.Join(b.e.DataDir, "volumes", "w")); err != nil {
				t.Fatal(err)
			}
		}
		// The workspace's end on a disk that can't be written is an error that says so,
		// and is made up for.
		b.wantGone(old)
		protect()
		wantReason(t, b.d.RemoveWorkspace(b.ctx(), "w", "uid-w", false), runtime.ReasonStorage, "read-only file system", "log.remove")
		unmount()
		ctrdtest.RemoveAll(t, b.d)
		if err := b.d.RemoveWorkspace(b.ctx(), "w", "uid-w", false); err != nil {
			t.Error(err)
		}
		unmount()
		b.nothingLeft()
	})
}

// inodes returns how many the file system has in use.
func inodes(t *testing.T, dir string) string {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(st.Files - st.Ffree)
}
