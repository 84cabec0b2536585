package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/store/seal"
)

// At any moment of the swap a second daemon finds the database in use, also one
// that has waited for the old file meanwhile.
func TestCompact_SecondDaemon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := filledWith(t, 3, 10)
		truth := readAll(t, h)
		second := h.cfg
		second.Around, second.OnCommit = nil, nil
		tried := 0
		try := func(moment, step string) {
			if _, err := Open(second); !errors.Is(err, ErrLocked) {
				t.Errorf("%s %s: got %v", moment, step, err)
			}
			tried++
		}
		waited := make(chan error, 1)
		h.around = func(ctx context.Context, step string, do func(context.Context) error) error {
			if step == stepCommit {
				return do(ctx)
			}
			try("before", step)
			if step == stepRename {
				go func() { // ends with its timeout at the latest
					db, file, err := openFile(second.Path, false)
					if err == nil {
						closeFile(db, file)
					}
					waited <- err
				}()
				synctest.Wait() // it has opened the old file
				return do(ctx)
			}
			err := do(ctx)
			if step != stepSyncName {
				try("after", step)
			}
			return err
		}
		primary := must(h.RotateKey(ctx, Options{}))(t).KeyID
		time.Sleep(time.Hour) // the bubble's clock
		synctest.Wait()
		if err := <-waited; !errors.Is(err, ErrLocked) {
			t.Errorf("who has waited got %v", err)
		}
		if tried < 5 {
			t.Errorf("only %d tries", tried)
		}
		try("at", "the end")
		checkKeys(t, h, primary)
		if diff := diffTruth(truth, readAll(t, h)); diff != "" {
			t.Error(diff)
		}
		h.close()
		h.cfg.Around = nil
		h.open() // nobody has it
		h.close()
	})
}

// A disk that is too full for the new file, or becomes so while it is written, has
// nothing of it left: the old file goes on, Keys says why, and once there is room
// it is done.
func TestCompact_DiskFull(t *testing.T) {
	withOwnMounts(t, func(t *testing.T, dir string) {
		mountTmpfs(t, dir, "40m")
		h := newHarnessIn(t, dir)
		h.create("a", value("K", "1"))
		steps := newManualUpkeep(h)
		filler := filepath.Join(dir, "filler")
		unfilled := func(step string, do func(context.Context) error) error { return do(ctx) }
		around := unfilled
		h.cfg.Around = func(_ context.Context, step string, do func(context.Context) error) error { return around(step, do) }
		h.reopen()

		for name, prepare := range map[string]func(){
			"from the start": func() {
				if err := os.WriteFile(filler, make([]byte, 25<<20), 0o600); err != nil {
					t.Fatal(err)
				}
			},
			"meanwhile": func() {
				around = func(step string, do func(context.Context) error) error {
					if step == stepCopy {
						fill(t, filler)
					}
					return do(ctx)
				}
			},
		} {
			primary := must(h.RotateKey(ctx, Options{}))(t).KeyID
			prepare()
			before := must(os.Stat(h.cfg.Path))(t)
			for h.keys().Problem == nil && steps.step(h) {
			}
			if keys := h.keys(); !errors.Is(keys.Problem, ErrDiskFull) || !keys.Compacting || keys.Rotating {
				t.Errorf("%s: got %+v", name, keys)
			}
			if !os.SameFile(before, must(os.Stat(h.cfg.Path))(t)) {
				t.Errorf("%s: there is another file", name)
			}
			if entries := must(os.ReadDir(dir))(t); len(entries) != 3 {
				t.Errorf("%s: files: %v", name, entries)
			}
			if h.values("a")["K"] != "1" {
				t.Errorf("%s: it can't be read", name)
			}
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			around = unfilled
			must(h.UpdateSecrets(ctx, in("a"), set("L", name), Options{}))(t)
			h.reopen() // or ten minutes later
			for steps.step(h) {
			}
			checkKeys(t, h, primary)
			if os.SameFile(before, must(os.Stat(h.cfg.Path))(t)) || h.values("a")["L"] != name || h.keys().Problem != nil {
				t.Errorf("%s: it is not done: %+v", name, h.keys())
			}
		}
		h.close()
	})
}

// The power fails at each step: what was acknowledged is there, by the old file or
// the new one, and the rotation comes to its end.
func TestCompact_PowerFailure(t *testing.T) {
	withOwnMounts(t, func(t *testing.T, dir string) {
		fs := newExt4(t, dir, "64M")
		kek := must(seal.LoadOrCreate(filepath.Join(dir, "key")))(t)
		h := &harness{t: t, clock: newClock(), record: &recorder{}}
		h.cfg = Config{Path: filepath.Join(fs.dir, "workspaced.db"), KEK: kek}
		h.open()
		h.create("a", value("K", "1"))
		h.create("b", value("K", "2"))
		truth := readAll(t, h)
		for _, step := range upkeepSteps {
			for _, moment := range fault.Moments {
				before := sealedOnes(t, h.db)
				cut := make(chan struct{})
				h.close()
				h.cfg.Around = func(ctx context.Context, s string, do func(context.Context) error) error {
					due := s == step
					select {
					case <-cut:
						return errors.New("the power is off")
					default:
					}
					if due && moment == fault.Before {
						fs.cutPower()
						close(cut)
					}
					err := do(ctx)
					if due && moment == fault.After {
						fs.cutPower()
						close(cut)
					}
					return err
				}
				h.open()
				primary := must(h.RotateKey(ctx, Options{}))(t).KeyID
				<-cut
				_ = h.Close()
				fs.unmount()
				fs.mount()
				h.cfg.Around = nil
				h.open()
				if diff := diffTruth(truth, readAll(t, h)); diff != "" {
					t.Errorf("%s %s: %s", moment, step, diff)
				}
				h.keptUp()
				checkKeys(t, h, primary)
				checkNothingLeft(t, h, before)
			}
		}
		h.close()
	})
}

// lateReader is a read transaction that has begun, and reads a secret of w00 when
// the gate is opened.
type lateReader struct {
	gate chan struct{}
	done chan struct{}
}

func (h *harness) readLate() lateReader {
	h.t.Helper()
	r, reading := lateReader{make(chan struct{}), make(chan struct{})}, make(chan struct{})
	go func() {
		defer close(r.done)
		err := h.view(func(tx *bolt.Tx) error {
			close(reading)
			<-r.gate
			w, err := getWorkspace(tx, "w00")
			if err != nil {
				return err
			}
			o := ownerOf(&w)
			_, x, err := openOwner(tx, h.sealer, o.name())
			if err != nil {
				return err
			}
			row, _ := o.get(tx, &x, "L")
			plain, err := o.open(tx, h.sealer, "L", &row)
			if err == nil && plain.Reveal() != "2" {
				h.t.Errorf("got %v", plain.Reveal())
			}
			return err
		})
		if err != nil {
			h.t.Error(err)
		}
	}()
	<-reading
	return r
}

// read has it read, and waits for its end.
func (r lateReader) read() {
	close(r.gate)
	<-r.done
}

// replacedFiles counts the files that are kept for readers.
func (h *harness) replacedFiles() int {
	h.t.Helper()
	time.Sleep(replacedRetry) // the bubble's clock
	synctest.Wait()
	if err := h.Ping(ctx); err != nil { // the writer has answered, and waits
		h.t.Fatal(err)
	}
	return len(h.replaced.files)
}

// Who reads while everything is sealed anew, the old key retired and the file
// replaced, reads what was there when it began, and holds up nobody.
func TestRotateKey_OldReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := filledWith(t, 3, 10)
		reader := h.readLate()
		var primary uint32
		for n := range 2 {
			primary = must(h.RotateKey(ctx, Options{}))(t).KeyID
			h.keptUp()
			if got := h.replacedFiles(); got != 1 {
				t.Errorf("rotation %d: %d files are kept for readers", n, got)
			}
			if h.values("w01")["L"] != "2" { // others read the new one meanwhile
				t.Error("got another value")
			}
			must(h.UpdateSecrets(ctx, in("w01"), set("NEW", fmt.Sprint(n)), Options{}))(t)
		}
		checkKeys(t, h, primary)
		reader.read()
		if got := h.replacedFiles(); got != 0 {
			t.Errorf("%d files are kept for readers", got)
		}
		h.close()
	})
}

// The end of the last reader of a file that was replaced takes no key from those of
// the next one, which another rotation is about to replace.
func TestRotateKey_OldReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := filledWith(t, 3, 10)
		upkeep := newManualUpkeep(h)
		first := h.readLate()
		must(h.RotateKey(ctx, Options{}))(t)
		for upkeep.step(h) {
		}
		second := h.readLate()
		primary := must(h.RotateKey(ctx, Options{}))(t).KeyID
		for h.keys().Rotating {
			upkeep.step(h)
		}
		first.read()
		if got := h.replacedFiles(); got != 0 {
			t.Errorf("%d files are kept for readers", got)
		}
		second.read()
		for upkeep.step(h) {
		}
		checkKeys(t, h, primary)
		h.close()
	})
}
