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

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/workspaced/workspaced/store/seal"
)

const diskFullChild = "WORKSPACED_TEST_DISK_FULL"

// On a file system that is really full, changes fail with ErrDiskFull, reading
// goes on, and changes work again once there is room. The file system is a small
// tmpfs, mounted in a child's own mount namespace, so that nothing is left.
func TestContract22_DiskFull(t *testing.T) {
	if dir := os.Getenv(diskFullChild); dir != "" {
		inFullDisk(t, dir)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestContract22_DiskFull$", "-test.v")
	cmd.Env = append(os.Environ(), diskFullChild+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || strings.Contains(string(out), "SKIPPED") {
		t.Skipf("SKIPPED: no mount namespace can be made here: %v %s", err, out)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: TestContract22_DiskFull") {
		t.Errorf("%v\n%s", err, out)
	}
}

func inFullDisk(t *testing.T, dir string) {
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=512k"); err != nil {
		t.Skipf("SKIPPED: tmpfs can't be mounted: %v", err)
	}
	record := &recorder{}
	h := &harness{t: t, clock: newClock(), record: record}
	h.cfg = Config{
		Path: filepath.Join(dir, "workspaced.db"), Sealer: must(seal.LoadOrCreate(filepath.Join(dir, "key")))(t),
		OnCommit: record.OnCommit, Now: h.clock.Now,
	}
	h.open()
	h.create("a", value("K", "1"))

	filler := filepath.Join(dir, "filler")
	for round := range 3 {
		fill(t, filler)
		done := 0
		err := error(nil)
		for err == nil && done < 1000 {
			_, err = h.UpdateSecrets(ctx, in("a"), set(fmt.Sprintf("R%d_%d", round, done), strings.Repeat("x", 2000)), Options{})
			done++
		}
		if !errors.Is(err, ErrDiskFull) {
			t.Fatalf("round %d: after %d changes: %v", round, done, err)
		}
		for range 3 { // and again
			h.record.take()
			before := must(h.Workspace("a"))(t)
			big := strings.Repeat("y", 60_000)
			if _, err := h.UpdateSecrets(ctx, in("a"), set("BIG", big), Options{}); !errors.Is(err, ErrDiskFull) {
				t.Fatalf("round %d: got %v", round, err)
			}
			if diff := cmp.Diff(before, must(h.Workspace("a"))(t)); diff != "" || h.record.take() != nil || h.Revision() != before.Revision {
				t.Errorf("something changed: %s", diff)
			}
			if values := h.values("a"); values["K"] != "1" || values["BIG"] != "" {
				t.Errorf("round %d: reading got %d values", round, len(values))
			}
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		r := must(h.UpdateSecrets(ctx, in("a"), set("AFTER", fmt.Sprint(round)), Options{}))(t)
		if !r.Changed || h.values("a")["AFTER"] != fmt.Sprint(round) {
			t.Errorf("round %d: with room again: %+v", round, r)
		}
		before := dump(t, h.db)
		h.reopen() // which checks every page
		if diff := cmp.Diff(before, dump(t, h.db)); diff != "" {
			t.Error(diff)
		}
		var u SecretsUpdate // make room for the next round
		secrets, _, err := h.ListSecrets(in("a"), "", 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range secrets {
			if strings.HasPrefix(s.Key, "R") {
				u.Delete = append(u.Delete, s.Key)
			}
		}
		must(h.UpdateSecrets(ctx, in("a"), u, Options{}))(t)
	}
	h.close()
}

// fill takes what is left of the file system.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for size := 64 << 10; size > 0; size /= 2 {
		for {
			if _, err := f.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
}
