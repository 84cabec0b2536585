package ctrd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBoundLogs(t *testing.T) {
	d := &Driver{logs: t.TempDir(), cfg: Config{MaxLogBytes: 100}}
	path := filepath.Join(d.logs, "w.log")
	writer, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640) // as a shim has it open
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte(strings.Repeat("o", 200)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(d.logs, "link.log")); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ write, now, old string }{
		{strings.Repeat("a", 100), strings.Repeat("a", 100), ""}, // as much as may be
		{"b", "", strings.Repeat("a", 99) + "b"},
		{"c", "c", strings.Repeat("a", 99) + "b"}, // and no hole before it
		{strings.Repeat("d", 1000) + "e", "", strings.Repeat("d", 99) + "e"},
	} {
		if _, err := writer.WriteString(step.write); err != nil {
			t.Fatal(err)
		}
		if err := d.BoundLogs(t.Context()); err != nil {
			t.Fatal(err)
		}
		now, err := os.ReadFile(path)
		if err != nil || string(now) != step.now {
			t.Errorf("after %.10q the log is %q, %v, want %q", step.write, now, err, step.now)
		}
		old, err := os.ReadFile(path + ".1")
		if string(old) != step.old || (err != nil && step.old != "") {
			t.Errorf("after %.10q the older log is %q, %v, want %q", step.write, old, err, step.old)
		}
	}
	if info, err := os.Stat(outside); err != nil || info.Size() != 200 {
		t.Errorf("what a link leads to was bounded: %v, %v", info, err)
	}
	if err := d.removeLogs("w"); err != nil {
		t.Error(err)
	}
	if err := boundLog(t.Context(), path, 1); err != nil {
		t.Errorf("no log any more: %v", err)
	}
	if left, err := os.ReadDir(d.logs); err != nil || len(left) != 1 {
		t.Errorf("left beside the link: %v, %v", left, err)
	}
}

// A workspace may be removed at any moment while its log is bounded: nothing of it
// is left, and a new one of the same id loses nothing.
func TestLogsAreRemovedWhileTheyAreBounded(t *testing.T) {
	d := unit()
	d.logs = t.TempDir()
	path := filepath.Join(d.logs, "w.log")
	for name, next := range map[string]string{"removed": "", "and made again": "new"} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, []byte(strings.Repeat("x", 200)), 0o640); err != nil {
				t.Fatal(err)
			}
			log, err := os.OpenFile(path, os.O_RDWR, 0) // BoundLogs has got so far
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			if err := d.removeLogs("w"); err != nil {
				t.Fatal(err)
			}
			if next != "" {
				if err := os.WriteFile(path, []byte(next), 0o640); err != nil {
					t.Fatal(err)
				}
			}
			if err := bound(t.Context(), log, path, 100); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(path + oldSuffix); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the older log: %v", err)
			}
			if got, _ := os.ReadFile(path); string(got) != next {
				t.Errorf("the log has %q, want %q", got, next)
			}
		})
	}
}

func TestBoundLogsEndsWithItsContext(t *testing.T) {
	d := unit()
	d.logs, d.cfg.MaxLogBytes = t.TempDir(), 100
	path := filepath.Join(d.logs, "w.log")
	if err := os.WriteFile(path, []byte(strings.Repeat("x", 200)), 0o640); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.BoundLogs(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("BoundLogs = %v", err)
	}
	if err := boundLog(ctx, path, 100); !errors.Is(err, context.Canceled) {
		t.Errorf("a copy that is cancelled = %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != 200 {
		t.Errorf("the log was emptied without being copied: %v", err)
	}
}

// What comes while the log is copied is newer than what was copied.
func TestCopyEndOfAGrowingLog(t *testing.T) {
	const limit = 100
	for _, growth := range []int64{0, 1, 100, 101, 1000} {
		t.Run(fmt.Sprint(growth), func(t *testing.T) {
			dir := t.TempDir()
			log, err := os.Create(filepath.Join(dir, "w.log"))
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			old, err := os.Create(filepath.Join(dir, "w.log.1"))
			if err != nil {
				t.Fatal(err)
			}
			defer old.Close()
			var text strings.Builder
			for i := range 500 {
				fmt.Fprintf(&text, "%09d\n", i)
			}
			if _, err := log.WriteString(text.String()); err != nil {
				t.Fatal(err)
			}
			// It was shorter when it was looked at first.
			if err := copyEnd(t.Context(), old, log, int64(text.Len())-growth, limit); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(old.Name())
			if err != nil || !strings.HasSuffix(text.String(), string(got)) || len(got) < limit || len(got) > 2*limit {
				t.Errorf("kept %d bytes %q, %v, want the last %d to %d", len(got), got, err, limit, 2*limit)
			}
		})
	}
}
