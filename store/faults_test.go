package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

func TestSteps_AllArePassed(t *testing.T) {
	in := fault.New()
	h := newHarness(t)
	h.around = in.Around
	h.create("a")
	must(h.RotateKey(ctx, Options{}))(t)
	h.keptUp()
	passed := in.Passed()
	steps := slices.Concat(Steps, upkeepSteps)
	for _, step := range steps {
		for _, moment := range fault.Moments {
			if passed[fault.Point{Step: step, Moment: moment}] == 0 {
				t.Errorf("%s %s was not passed", moment, step)
			}
		}
	}
	if len(passed) != len(steps)*len(fault.Moments) {
		t.Errorf("steps that have no name here were passed: %v", passed)
	}
}

// A commit that fails before it is done changes nothing. One that fails after it
// was done is in doubt: its callers get an error, what it changed is told, and is
// there after a restart. Then all goes on.
func TestFaults(t *testing.T) {
	for _, moment := range fault.Moments {
		for _, action := range []fault.Action{fault.Error, fault.Panic, fault.Hang} {
			for _, end := range []string{"goes on", "restart"} {
				t.Run(fmt.Sprint(moment, " ", action, ", ", end), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { testFault(t, moment, action, end == "restart") })
				})
			}
		}
	}
}

func testFault(t *testing.T, moment fault.Moment, action fault.Action, restart bool) {
	h := newHarness(t)
	h.create("a", value("K", "1"))
	h.record.take()
	before := dump(t, h.db)

	injector := fault.New(fault.Rule{Step: stepCommit, Moment: moment, Action: action, Times: 1})
	h.around = func(ctx context.Context, step string, do func(context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, time.Hour) // a disk that comes back
		defer cancel()
		return injector.Around(ctx, step, do)
	}
	repeat := request("id", "one")
	deadline, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	begin := time.Now()
	r, err := h.UpdateSecrets(deadline, in("a"), set("K", "2"), repeat)

	want := map[fault.Action]error{fault.Error: fault.ErrInjected, fault.Hang: context.DeadlineExceeded}[action]
	var paniced *PanicError
	if action == fault.Panic && !errors.As(err, &paniced) || action != fault.Panic && !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
	// What hangs may still be done, for all its caller knows.
	if doubt := moment == fault.After || action == fault.Hang; errors.Is(err, ErrInDoubt) != doubt {
		t.Errorf("in doubt: %v, of %v", !doubt, err)
	}
	if r.Changed || r.Workspace.ID != "" {
		t.Errorf("an error with a result: %+v", r)
	}
	if waited := time.Since(begin); action == fault.Hang && waited != time.Minute || action != fault.Hang && waited != 0 {
		t.Errorf("the caller waited %v", waited)
	}

	if restart {
		h.reopen() // what hangs ends with it
	} else {
		time.Sleep(time.Hour) // the bubble's clock
		synctest.Wait()
	}
	if moment == fault.Before {
		if diff := cmp.Diff(before, dump(t, h.db)); diff != "" || h.Revision() != 1 || h.record.take() != nil {
			t.Errorf("something changed: %s", diff)
		}
	} else {
		w := must(h.Workspace("a"))(t)
		changes := []Change{{ID: "a", UID: w.UID, Revision: 2, Desired: true}}
		if diff := cmp.Diff(changes, h.record.take()); diff != "" || w.Generation != 2 || h.Revision() != 2 || h.values("a")["K"] != "2" {
			t.Errorf("generation %d, revision %d: %s", w.Generation, h.Revision(), diff)
		}
	}

	// Who repeats the request has it done, once.
	r = must(h.UpdateSecrets(ctx, in("a"), set("K", "2"), repeat))(t)
	if !r.Changed || r.Workspace.Generation != 2 || h.values("a")["K"] != "2" {
		t.Errorf("the repeated request: got %+v", r)
	}
	h.reopen()
	if w := must(h.Workspace("a"))(t); w.Generation != 2 || h.values("a")["K"] != "2" {
		t.Errorf("after a restart: got %+v", w)
	}
	h.close()
}

// A caller whose context ends gets an answer at once, wherever its change is;
// unless it is being committed the answer means that it never happens.
func TestWriter_ContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		gate := make(chan struct{})
		h.around = func(ctx context.Context, _ string, do func(context.Context) error) error {
			<-gate
			return do(ctx)
		}
		var wg sync.WaitGroup
		errs := map[string]error{}
		var mu sync.Mutex
		create := func(ctx context.Context, id string, o Options) {
			wg.Go(func() {
				_, err := h.CreateWorkspace(ctx, NewWorkspace{ID: id}, o)
				mu.Lock()
				defer mu.Unlock()
				errs[id] = err
			})
			synctest.Wait() // one after the other
		}
		ended, cancel := context.WithCancel(ctx)
		create(ctx, "first", Options{})
		// The next batch: only its first part is in the commit that hangs.
		create(ended, "committing", Options{})
		create(ended, "rehearsal", Options{ValidateOnly: true})
		create(ended, "behind", Options{})
		create(ctx, "patient", Options{})
		gate <- struct{}{} // the first commit ends, the second one begins
		synctest.Wait()
		create(ended, "waiting", Options{})
		cancel()
		synctest.Wait()
		create(ended, "ended", Options{})

		mu.Lock()
		for id, doubt := range map[string]bool{"committing": true, "rehearsal": false, "behind": false, "waiting": false, "ended": false} {
			if err := errs[id]; !errors.Is(err, context.Canceled) || errors.Is(err, ErrInDoubt) != doubt {
				t.Errorf("%s: got %v", id, err)
			}
		}
		if _, answered := errs["patient"]; answered {
			t.Error("who has time did not wait")
		}
		mu.Unlock()
		close(gate)
		wg.Wait()
		ws, _, err := h.ListWorkspaces("", 0, nil)
		var ids []string
		for _, w := range ws {
			ids = append(ids, w.ID)
		}
		if diff := cmp.Diff([]string{"committing", "first", "patient"}, ids); diff != "" || err != nil || errs["patient"] != nil {
			t.Errorf("%v, %v: %s", err, errs["patient"], diff)
		}
		h.close()
	})
}

// While the disk hangs reads go on, and thousands of changes with deadlines come
// and go without a trace.
func TestWriter_HungDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		h.create("a", value("K", "1"))
		gate := make(chan struct{})
		h.around = func(ctx context.Context, _ string, do func(context.Context) error) error {
			<-gate
			return do(ctx)
		}
		var wg sync.WaitGroup
		hang := func() { // for ten seconds
			deadline, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			_, err := h.RestartWorkspace(deadline, "a", Options{})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
		}
		wg.Go(hang)
		synctest.Wait()
		for range 10 {
			for range 1000 {
				wg.Go(hang)
			}
			synctest.Wait()
			if w := must(h.Workspace("a"))(t); w.Generation != 1 || h.values("a")["K"] != "1" {
				t.Errorf("got %+v", w)
			}
			if ws, _, err := h.ListWorkspaces("", 0, nil); err != nil || len(ws) != 1 {
				t.Errorf("got %v, %v", ws, err)
			}
			if page := must(h.Feed(0, 0))(t); len(page.Entries) != 1 {
				t.Errorf("got %+v", page)
			}
			time.Sleep(11 * time.Second) // the bubble's clock
			wg.Wait()                    // nobody is left
		}
		close(gate)
		must(h.RestartWorkspace(ctx, "a", Options{}))(t)
		// The one in the commit was done, none of the others.
		if w := must(h.Workspace("a"))(t); w.Generation != 3 || h.ended() != 3 {
			t.Errorf("generation %d after %d commits", w.Generation, h.ended())
		}
		h.close()
	})
}

// Close waits for a hung disk for a while, and says so.
func TestClose_HungDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		release := h.hold()
		var wg sync.WaitGroup
		wg.Go(func() { h.create("a") })
		synctest.Wait()
		begin := time.Now()
		for range 2 {
			if err := h.Close(); err == nil || !strings.Contains(err.Error(), "the disk has not answered for 10s") {
				t.Errorf("got %v", err)
			}
		}
		if waited := time.Since(begin); waited != closeTimeout {
			t.Errorf("it took %v", waited)
		}
		release()
		wg.Wait()
		synctest.Wait()
		h.open() // the file was closed all the same
		must(h.Workspace("a"))(t)
		h.close()
	})
}

func TestPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		transactions := h.db.Stats()
		for range 3 {
			if err := h.Ping(ctx); err != nil {
				t.Error(err)
			}
		}
		if now := h.db.Stats(); now.TxN != transactions.TxN || now.TxStats != transactions.TxStats {
			t.Error("it made a transaction")
		}

		release := h.hold()
		var wg sync.WaitGroup
		wg.Go(func() { h.create("a") })
		synctest.Wait()
		deadline, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if err := h.Ping(deadline); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("during a commit that hangs: got %v", err)
		}
		wg.Go(func() {
			if err := h.Ping(ctx); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		release()
		wg.Wait()
		h.close()
		if err := h.Ping(ctx); !errors.Is(err, ErrClosed) {
			t.Errorf("of a closed one: got %v", err)
		}
	})
}

// logBuffer takes what is logged.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

// take returns the lines since the last take.
func (b *logBuffer) take() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	lines := strings.Split(strings.TrimSuffix(b.text.String(), "\n"), "\n")
	b.text.Reset()
	if lines[0] == "" {
		return nil
	}
	return lines
}

func (b *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}

func TestSlowDisk_IsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		h := newHarness(t)
		h.cfg.Logger = log.logger()
		h.reopen()
		h.create("a")
		var takes time.Duration
		h.around = func(ctx context.Context, _ string, do func(context.Context) error) error {
			time.Sleep(takes) // the bubble's clock
			return do(ctx)
		}
		const slow = `level=WARN msg="the disk is slow: changes wait for a commit, reads go on" for=`
		const ended = `level=WARN msg="the slow commit has ended" took=`
		for _, test := range []struct {
			pause, takes time.Duration
			want         []string
		}{
			{0, 999 * time.Millisecond, nil},
			{0, 1500 * time.Millisecond, []string{slow + "1s", ended + "1.5s"}},
			{0, 50 * time.Second, nil}, // the last warning was not a minute ago
			{30 * time.Second, 1500 * time.Millisecond, []string{slow + "1s", ended + "1.5s"}},
			{2 * time.Minute, 130 * time.Second, []string{slow + "1s", slow + "1m1s", slow + "2m1s", ended + "2m10s"}},
			{2 * time.Minute, 0, nil},
		} {
			time.Sleep(test.pause) // the bubble's clock
			takes = test.takes
			must(h.RestartWorkspace(ctx, "a", Options{}))(t)
			if diff := cmp.Diff(test.want, log.take()); diff != "" {
				t.Errorf("a commit of %v: %s", test.takes, diff)
			}
		}
		h.close()
	})
}

// Who is told of a commit can't end the writer.
func TestWriter_OnCommitPanics(t *testing.T) {
	log := &logBuffer{}
	h := newHarness(t)
	h.cfg.Logger = log.logger()
	h.cfg.OnCommit = func([]Change) { panic("listener") }
	h.reopen()
	h.create("a")
	h.create("b")
	lines := log.take()
	if len(lines) != 2 || !strings.Contains(lines[0], "level=ERROR") || !strings.Contains(lines[0], "panic=listener") ||
		!strings.Contains(lines[0], "TestWriter_OnCommitPanics") {
		t.Errorf("logged: %q", lines)
	}
}
