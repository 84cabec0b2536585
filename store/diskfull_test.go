package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// On a file system that is really full, changes fail with ErrDiskFull, reading
// goes on, the file does not grow, and changes work again once there is room.
func TestContract22_DiskFull(t *testing.T) {
	withOwnMounts(t, func(t *testing.T, dir string) {
		for name, mount := range map[string]func(dir string) string{
			"tmpfs": func(dir string) string { mountTmpfs(t, dir, "512k"); return dir },
			"ext4":  func(dir string) string { return newExt4(t, dir, "10M").dir },
		} {
			dir := filepath.Join(dir, name)
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			inFullDisk(t, mount(dir))
		}
	})
}

func inFullDisk(t *testing.T, dir string) {
	h := newHarnessIn(t, dir)
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
		var size int64
		for i := range 50 { // and again
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
			if now := must(os.Stat(h.cfg.Path))(t).Size(); i == 0 {
				size = now
			} else if now != size {
				t.Errorf("round %d: the file has grown from %d to %d bytes in vain", round, size, now)
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
