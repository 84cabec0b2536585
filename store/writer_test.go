package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
)

// hold makes the next commit wait until release is called, and the ones after
// it go on as usual. It must be called before the first change.
func (h *harness) hold() (release func()) {
	gate := make(chan struct{})
	var once sync.Once
	h.around = func(ctx context.Context, _ string, do func(context.Context) error) error {
		once.Do(func() { <-gate })
		return do(ctx)
	}
	return func() { close(gate) }
}

// During one commit many callers come: they share the next one.
func TestWriter_SharesCommits(t *testing.T) {
	for _, test := range []struct{ callers, commits int }{{1, 2}, {2, 2}, {64, 2}, {maxBatch, 2}, {maxBatch + 1, 3}} {
		t.Run(fmt.Sprint(test.callers), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHarness(t)
				release := h.hold()
				var wg sync.WaitGroup
				wg.Go(func() { h.create("first") })
				synctest.Wait() // in its commit
				done := make([]Result, test.callers)
				for i := range test.callers {
					wg.Go(func() {
						var err error
						done[i], err = h.CreateWorkspace(ctx, NewWorkspace{ID: fmt.Sprint("w", i)}, Options{})
						if err != nil {
							t.Error(err)
						}
					})
				}
				synctest.Wait() // all wait for the writer
				if _, err := h.Workspace("first"); !errors.Is(err, ErrNotFound) || h.record.take() != nil {
					t.Errorf("something is visible before the commit: %v", err)
				}
				release()
				wg.Wait()
				if n := h.ended(); n != uint64(test.commits) {
					t.Errorf("%d commits, want %d", n, test.commits)
				}
				for i, r := range done {
					if diff := cmp.Diff(r.Workspace, must(h.Workspace(fmt.Sprint("w", i)))(t)); diff != "" {
						t.Error(diff)
					}
				}
				if n := len(h.record.take()); n != test.callers+1 {
					t.Errorf("%d changes were told", n)
				}
				h.close()
			})
		})
	}
}

// What a batch of operations does to each other: nothing.
func TestWriter_BadOperationsHarmNobody(t *testing.T) {
	errBad := errors.New("bad")
	bad := map[string]func(*txn) (int, error){
		"fails before it writes": func(*txn) (int, error) { return 1, errBad },
		"fails after it wrote": func(t *txn) (int, error) {
			w := Workspace{ID: "bad", UID: "bad"}
			t.bump(&w, ReasonCreated)
			return 1, errors.Join(t.putConfig(&w, Change{Desired: true}), t.put(bucketTokens, []byte("bad"), []byte("{}")), errBad)
		},
		"panics before it writes": func(*txn) (int, error) { panic(errBad) },
		"panics after it wrote": func(t *txn) (int, error) {
			w := Workspace{ID: "bad", UID: "bad"}
			if err := t.putConfig(&w, Change{}); err != nil {
				return 1, err
			}
			panic(errBad)
		},
		"dereferences nil": func(t *txn) (int, error) { return len((*Workspace)(nil).ID), t.Bucket([]byte("none")).Put(nil, nil) },
	}
	for name, f := range bad {
		for _, position := range []int{0, 3, 7} {
			t.Run(fmt.Sprint(name, position), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					h := newHarness(t)
					release := h.hold()
					var wg sync.WaitGroup
					wg.Go(func() { h.create("first") })
					synctest.Wait()
					for i := range 8 {
						wg.Go(func() {
							if i != position {
								h.create(fmt.Sprint("w", i))
								return
							}
							n, err := change(ctx, h.Store, false, f)
							var paniced *PanicError
							if !errors.Is(err, errBad) && !errors.As(err, &paniced) || n != 0 {
								t.Errorf("got %d, %v", n, err)
							}
							if paniced != nil && len(paniced.Stack) == 0 {
								t.Error("no stack")
							}
						})
						synctest.Wait() // one after the other
					}
					release()
					wg.Wait()
					ws, _, err := h.ListWorkspaces("", 0, nil)
					if err != nil || len(ws) != 8 {
						t.Errorf("%d workspaces, %v", len(ws), err)
					}
					if n := h.ended(); n != 2 {
						t.Errorf("%d commits", n)
					}
					rows := dump(t, h.db)
					if rows["tokens"]["bad"] != "" || len(rows["feed"]) != 8 || h.Revision() != 8 || len(h.record.take()) != 8 {
						t.Errorf("the bad one left something: %v", rows)
					}
					h.close()
				})
			})
		}
	}
}

func TestWriter_CloseFinishesWhatWasTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		release := h.hold()
		var wg sync.WaitGroup
		wg.Go(func() { h.create("taken") })
		synctest.Wait()
		wg.Go(func() {
			if _, err := h.CreateWorkspace(ctx, NewWorkspace{ID: "waiting"}, Options{}); !errors.Is(err, ErrClosed) {
				t.Errorf("waiting: got %v", err)
			}
		})
		synctest.Wait()
		wg.Go(h.close)
		synctest.Wait()
		release()
		wg.Wait()
		h.close() // it can be repeated
		for name, f := range map[string]func() error{
			"change": func() error { _, err := h.CreateWorkspace(ctx, NewWorkspace{ID: "late"}, Options{}); return err },
			"read":   func() error { _, err := h.Workspace("taken"); return err },
			"list":   func() error { _, _, err := h.ListWorkspaces("", 0, nil); return err },
			"feed":   func() error { _, err := h.Feed(0, 0); return err },
		} {
			if err := f(); !errors.Is(err, ErrClosed) {
				t.Errorf("%s: got %v", name, err)
			}
		}
		h.open()
		ws, _, err := h.ListWorkspaces("", 0, nil)
		if err != nil || len(ws) != 1 || ws[0].ID != "taken" {
			t.Errorf("got %v, %v", ws, err)
		}
		h.close()
	})
}

// No lost change: what was acknowledged is there after the store ends at any
// moment, and was told before it was acknowledged.
func TestContract01_AcknowledgedIsDurable(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	const callers = 16
	acknowledged := make([][]int64, callers)
	var wg sync.WaitGroup
	started := make(chan struct{}, callers)
	for i := range callers {
		wg.Go(func() {
			for n := 0; ; n++ {
				r, err := h.UpdateSecrets(ctx, in("a"), set(fmt.Sprint("K", i), fmt.Sprint(n)), Options{})
				if errors.Is(err, ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				acknowledged[i] = append(acknowledged[i], r.Workspace.Generation)
				if n == 5 {
					started <- struct{}{}
				}
			}
		})
	}
	for range callers {
		<-started
	}
	h.close()
	wg.Wait()
	h.open()

	told := map[uint64]bool{}
	for _, c := range h.record.take() {
		told[c.Revision] = true
	}
	values := h.values("a")
	seen := map[int64]bool{}
	for i, generations := range acknowledged {
		if got, want := values[fmt.Sprint("K", i)], fmt.Sprint(len(generations)-1); got != want {
			t.Errorf("K%d is %s, want %s", i, got, want)
		}
		for _, g := range generations {
			if seen[g] {
				t.Errorf("two changes have generation %d", g)
			}
			seen[g] = true
			if !told[uint64(g)] { // here each generation has its revision
				t.Errorf("generation %d was not told", g)
			}
		}
	}
	if w := must(h.Workspace("a"))(t); w.Generation != int64(len(seen))+1 {
		t.Errorf("generation %d after %d changes", w.Generation, len(seen))
	}
}

func TestWriter_CommitFails(t *testing.T) {
	for _, test := range []struct {
		name    string
		commit  func(do func(context.Context) error) error
		want    error
		visible bool
	}{
		{"disk full", func(func(context.Context) error) error { return &pathError{syscall.ENOSPC} }, ErrDiskFull, false},
		{"quota", func(func(context.Context) error) error { return &pathError{syscall.EDQUOT} }, ErrDiskFull, false},
		{"file size limit, flattened", func(func(context.Context) error) error {
			return errors.New("file resize error: " + syscall.EFBIG.Error())
		}, ErrDiskFull, false},
		{"input/output", func(func(context.Context) error) error { return &pathError{syscall.EIO} }, syscall.EIO, false},
		{"last sync", func(do func(context.Context) error) error { return errors.Join(do(ctx), &pathError{syscall.EIO}) }, syscall.EIO, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHarness(t)
			h.create("a")
			h.record.take()
			before := dump(t, h.db)
			h.around = func(_ context.Context, _ string, do func(context.Context) error) error { return test.commit(do) }
			if r, err := h.CreateWorkspace(ctx, NewWorkspace{ID: "b"}, Options{}); !errors.Is(err, test.want) || r.Changed {
				t.Errorf("got %+v, %v", r, err)
			}
			if !test.visible {
				if diff := cmp.Diff(before, dump(t, h.db)); diff != "" || h.Revision() != 1 || h.record.take() != nil {
					t.Errorf("something changed: %s", diff)
				}
			} else if changes := h.record.take(); len(changes) != 1 || changes[0].ID != "b" || h.Revision() != 2 {
				t.Errorf("readers see it and nobody was told: %+v", changes)
			}
			h.around = nil
			must(h.CreateWorkspace(ctx, NewWorkspace{ID: "c"}, Options{}))(t)
			h.reopen()
			must(h.Workspace("c"))(t)
		})
	}
}

// A change that gives no workspace a new revision is in doubt like any other when
// its commit fails at the very end.
func TestWriter_CommitFailsWithoutANewRevision(t *testing.T) {
	for name, do := range map[string]func(*harness) error{
		"global secret, next start": func(h *harness) error {
			u := set("G", "new")
			u.NextStart = true
			_, err := h.UpdateSecrets(ctx, Scope{}, u, Options{})
			return err
		},
		"request id": func(h *harness) error {
			_, err := h.StopWorkspace(ctx, "parked", request("id", "f"))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.create("parked")
			must(h.StopWorkspace(ctx, "parked", Options{}))(t)
			before := dump(t, h.db)
			commits, settled := h.Commits()
			if !settled {
				t.Error("a commit is under way before there was one")
			}
			h.around = func(_ context.Context, _ string, do func(context.Context) error) error {
				if n, settled := h.Commits(); settled || n == commits {
					t.Error("a commit that begins does not count")
				}
				err := do(ctx)
				// Readers see it, and nobody knows how much longer it takes.
				if n, settled := h.Commits(); settled || n == commits {
					t.Error("a commit that can be read does not count")
				}
				return errors.Join(err, &pathError{syscall.ENOSPC})
			}
			if err := do(h); !errors.Is(err, ErrInDoubt) || errors.Is(err, ErrDiskFull) {
				t.Errorf("got %v, want ErrInDoubt", err)
			}
			if n, settled := h.Commits(); !settled || n == commits {
				t.Errorf("after it: %d commits, settled %v, %d before", n, settled, commits)
			}
			if cmp.Equal(before, dump(t, h.db)) {
				t.Error("nothing was written")
			}
			h.around = nil
			h.reopen()
			if err := do(h); err != nil {
				t.Error(err)
			}
		})
	}
}

type pathError struct{ errno syscall.Errno }

func (e *pathError) Error() string { return "write db: " + e.errno.Error() }
func (e *pathError) Unwrap() error { return e.errno }

// ValidateOnly answers what would be, and changes nothing.
func TestValidateOnly(t *testing.T) {
	only := Options{ValidateOnly: true}
	for name, do := range map[string]func(*harness, Options) (Result, error){
		"create": func(h *harness, o Options) (Result, error) {
			return h.CreateWorkspace(ctx, NewWorkspace{ID: "n", Secrets: []SecretValue{value("K", "1")}}, o)
		},
		"update": func(h *harness, o Options) (Result, error) {
			return h.UpdateWorkspace(ctx, "a", func(e *Editable) error { e.Model = "m"; return nil }, o)
		},
		"delete":  func(h *harness, o Options) (Result, error) { return h.DeleteWorkspace(ctx, "a", false, o) },
		"restart": func(h *harness, o Options) (Result, error) { return h.RestartWorkspace(ctx, "a", o) },
		"stop":    func(h *harness, o Options) (Result, error) { return h.StopWorkspace(ctx, "a", o) },
		"start":   func(h *harness, o Options) (Result, error) { return h.StartWorkspace(ctx, "p", o) },
		"secrets": func(h *harness, o Options) (Result, error) {
			return h.UpdateSecrets(ctx, in("a"), SecretsUpdate{Set: set("K", "2", "L", "3").Set, Delete: []string{"M"}}, o)
		},
		"global": func(h *harness, o Options) (Result, error) { return h.UpdateSecrets(ctx, Scope{}, set("G", "2"), o) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.create("a", value("K", "1"), value("M", "1"))
			h.create("p")
			must(h.StopWorkspace(ctx, "p", Options{}))(t)
			h.record.take()
			before := dump(t, h.db)
			would := must(do(h, only))(t)
			if diff := cmp.Diff(before, dump(t, h.db)); diff != "" || h.record.take() != nil {
				t.Errorf("something changed: %s", diff)
			}
			is := must(do(h, Options{}))(t)
			ignore := cmp.FilterPath(func(p cmp.Path) bool {
				switch p.Last().String() {
				case ".UID", ".CreateTime", ".UpdateTime", ".PendingSince", ".Time":
					return true
				}
				return false
			}, cmp.Ignore())
			if diff := cmp.Diff(is, would, ignore); diff != "" || !would.Changed {
				t.Errorf("the answer is not the change's: %s", diff)
			}
		})
	}

	// In the middle of others, and failing, and panicking.
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		release := h.hold()
		var wg sync.WaitGroup
		wg.Go(func() { h.create("first") })
		for i := range 6 {
			synctest.Wait()
			wg.Go(func() {
				switch i % 3 {
				case 0:
					h.create(fmt.Sprint("w", i))
				case 1:
					r, err := h.CreateWorkspace(ctx, NewWorkspace{ID: "only"}, only)
					if err != nil || !r.Changed {
						t.Errorf("got %+v, %v", r, err)
					}
				case 2:
					_, err := h.UpdateWorkspace(ctx, "first", func(*Editable) error { panic("edit") }, only)
					var paniced *PanicError
					if !errors.As(err, &paniced) {
						t.Errorf("got %v", err)
					}
				}
			})
		}
		synctest.Wait()
		release()
		wg.Wait()
		if ws, _, err := h.ListWorkspaces("", 0, nil); err != nil || len(ws) != 3 {
			t.Errorf("got %v, %v", ws, err)
		}
		h.close()
	})
}

// What a row has already is not written: alone it is no commit, and beside
// something else none of its pages is.
func TestWriter_EqualRowsAreNotWritten(t *testing.T) {
	h := newHarness(t)
	put := func(value string) {
		t.Helper()
		_, err := change(ctx, h.Store, false, func(t *txn) (int, error) {
			return 0, errors.Join(t.put(bucketTokens, []byte("k"), []byte(value)), t.put(bucketTokens, []byte("empty"), nil))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, step := range []struct {
		value   string
		commits uint64
	}{{"a", 1}, {"a", 0}, {"b", 1}, {"", 1}, {"", 0}} {
		before := h.ended()
		put(step.value)
		if got := h.ended() - before; got != step.commits {
			t.Errorf("step %d, %q: %d commits, want %d", i, step.value, got, step.commits)
		}
		if got := dump(t, h.db)["tokens"]["k"]; got != step.value {
			t.Errorf("step %d: got %q, want %q", i, got, step.value)
		}
	}

}

// What a change writes lies together: in few pages, which are most of what a commit
// takes.
func TestWriter_FewPages(t *testing.T) {
	h := newHarness(t)
	fillWorkspaces(h, 64) // else all is in one page
	before := h.db.Stats()
	must(h.UpdateSecrets(ctx, in("w1"), set("K", "22"), audited("set")))(t)
	after := h.db.Stats()
	// Two each of secrets, sealed, workspaces and audit, one of feed, root, freelist
	// and meta, and two leaves that may have been split.
	if n := after.TxStats.GetWrite() - before.TxStats.GetWrite(); n > 14 {
		t.Errorf("%d pages are written", n)
	}
}
