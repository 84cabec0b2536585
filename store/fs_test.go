package store

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/store/seal"
)

const ownMountsVariable = "WORKSPACED_TEST_MOUNTS"

// withOwnMounts runs the rest of a test in a child that has a mount namespace of
// its own, so that nothing is left of what it mounts. dir is there for that.
func withOwnMounts(t *testing.T, f func(t *testing.T, dir string)) {
	t.Helper()
	if dir := os.Getenv(ownMountsVariable); dir != "" {
		f(t, dir)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), ownMountsVariable+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || strings.Contains(string(out), "SKIPPED") {
		t.Skipf("SKIPPED: nothing can be mounted here: %v %s", err, out)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// mountTmpfs mounts a file system in memory.
func mountTmpfs(t *testing.T, dir, size string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("SKIPPED: tmpfs: %v", err)
	}
}

// ext4 is a real file system, in a file.
type ext4 struct {
	t          *testing.T
	image, dir string
}

// newExt4 makes one of that size and mounts it.
func newExt4(t *testing.T, dir, size string) *ext4 {
	t.Helper()
	fs := &ext4{t: t, image: filepath.Join(dir, "image"), dir: filepath.Join(dir, "mnt")}
	if err := os.Mkdir(fs.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-m", "0", "-J", "size=4", fs.image, size}, fs.mountArgs()} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Skipf("SKIPPED: %s: %v %s", args[0], err, out)
		}
	}
	return fs
}

func (fs *ext4) mountArgs() []string {
	return []string{"mount", "-t", "ext4", "-o", "loop", fs.image, fs.dir}
}

func (fs *ext4) mount() {
	fs.t.Helper()
	fs.run(fs.mountArgs()...)
}

func (fs *ext4) unmount() {
	fs.t.Helper()
	fs.run("umount", fs.dir)
}

func (fs *ext4) run(args ...string) {
	fs.t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		fs.t.Fatalf("%s: %v %s", args[0], err, out)
	}
}

// What ioctl EXT4_IOC_SHUTDOWN, see ext4(5), takes.
const (
	ext4IocShutdown   = 0x8004587d
	shutdownNoLogSync = 2
)

// cutPower stops all writing at once. What was not synced is gone with the next
// unmount.
func (fs *ext4) cutPower() {
	fs.t.Helper()
	d, err := os.Open(fs.dir)
	if err != nil {
		fs.t.Fatal(err)
	}
	err = unix.IoctlSetPointerInt(int(d.Fd()), ext4IocShutdown, shutdownNoLogSync)
	if err := errors.Join(err, d.Close()); err != nil {
		fs.t.Fatal(err)
	}
}

// ended counts the commits that have ended; there is none under way.
func (h *harness) ended() uint64 { return h.commits.Load() / 2 }

// newHarnessIn is newHarness with the files in dir.
func newHarnessIn(t *testing.T, dir string) *harness {
	t.Helper()
	h := &harness{t: t, clock: newClock(), record: &recorder{}}
	h.cfg = Config{
		Path: filepath.Join(dir, "workspaced.db"), KEK: must(seal.LoadOrCreate(filepath.Join(dir, "key")))(t),
		OnCommit: h.record.OnCommit, Now: h.clock.Now,
	}
	h.open()
	return h
}

// A file system that becomes read-only, as ext4 does when it meets an error:
// changes fail with ErrReadOnly, reading goes on, and what was acknowledged is
// there once the file system is mounted anew.
func TestContract22_ReadOnlyFileSystem(t *testing.T) {
	withOwnMounts(t, func(t *testing.T, dir string) {
		fs := newExt4(t, dir, "16M")
		h := newHarnessIn(t, fs.dir)
		h.create("a", value("K", "1"))
		h.record.take()
		before := dump(t, h.db)
		fs.run("mount", "-o", "remount,abort", fs.dir)
		for range 20 {
			_, err := h.UpdateSecrets(ctx, in("a"), set("K", strings.Repeat("x", 60_000)), Options{})
			if !errors.Is(err, ErrReadOnly) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), h.cfg.Path) {
				t.Fatalf("got %v", err)
			}
		}
		if h.values("a")["K"] != "1" || h.record.take() != nil || h.Revision() != 1 {
			t.Errorf("got %v, revision %d", h.values("a"), h.Revision())
		}
		if err := h.Ping(ctx); err != nil {
			t.Errorf("Ping: %v", err)
		}
		h.close()
		fs.unmount()

		// A start on it changes nothing.
		fs.mount()
		fs.run("mount", "-o", "remount,ro", fs.dir)
		s, err := Open(h.cfg)
		if err == nil {
			_ = s.Close()
		}
		if !errors.Is(err, ErrReadOnly) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), h.cfg.Path) {
			t.Errorf("Open: got %v", err)
		}
		cfg := h.cfg
		cfg.Path += ".new"
		if _, err := Open(cfg); !errors.Is(err, ErrReadOnly) || !strings.Contains(err.Error(), cfg.Path) {
			t.Errorf("Open of a new one: got %v", err)
		}
		fs.unmount()

		fs.mount()
		h.open()
		if diff := diffRows(before, dump(t, h.db)); diff != "" {
			t.Error(diff)
		}
		must(h.UpdateSecrets(ctx, in("a"), set("K", "2"), Options{}))(t)
		h.close()
		fs.unmount()
	})
}

// diffRows says which rows differ, not how.
func diffRows(want, got map[string]map[string]string) string {
	var diffs []string
	for bucket, rows := range want {
		for key, value := range rows {
			if v, ok := got[bucket][key]; !ok || v != value {
				diffs = append(diffs, fmt.Sprintf("%s/%q", bucket, key))
			}
		}
		if len(got[bucket]) > len(rows) {
			diffs = append(diffs, bucket+" has more")
		}
	}
	return strings.Join(diffs, " ")
}

// A disk that fails to take what is written: changes fail, reading goes on.
func TestFailingDisk(t *testing.T) {
	withOwnMounts(t, func(t *testing.T, dir string) {
		fs := newExt4(t, dir, "16M")
		h := newHarnessIn(t, fs.dir)
		h.create("a", value("K", "1"))
		h.record.take()
		fs.cutPower()
		for range 20 {
			_, err := h.UpdateSecrets(ctx, in("a"), set("K", strings.Repeat("x", 60_000)), Options{})
			if !errors.Is(err, syscall.EIO) && (err == nil || !strings.HasSuffix(err.Error(), syscall.EIO.Error())) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("got %v", err)
			}
		}
		if h.values("a")["K"] != "1" || h.record.take() != nil || h.Revision() != 1 {
			t.Errorf("got %v, revision %d", h.values("a"), h.Revision())
		}
		h.close()
		fs.unmount()
		fs.mount()
		h.open()
		if h.values("a")["K"] != "1" {
			t.Errorf("got %v", h.values("a"))
		}
		h.close()
		fs.unmount()
	})
}
