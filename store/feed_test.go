package store

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// follower keeps what a reader of the feed knows.
type follower struct {
	h     *harness
	known map[string]Workspace
	at    uint64
}

// sync reads everything anew, in pages.
func (f *follower) sync(limit int) {
	f.h.t.Helper()
	f.known, f.at = map[string]Workspace{}, 0
	since := f.h.Revision()
	for more := true; more; {
		page := must(f.h.FeedSince(since, f.at, limit))(f.h.t)
		f.apply(page)
		more = page.More
	}
}

// follow reads what is new, in pages.
func (f *follower) follow(limit int) {
	f.h.t.Helper()
	for more := true; more; {
		page := must(f.h.Feed(f.at, limit))(f.h.t)
		f.apply(page)
		more = page.More
	}
}

func (f *follower) apply(page FeedPage) {
	f.h.t.Helper()
	last := f.at
	for _, e := range page.Entries {
		if e.Revision <= last {
			f.h.t.Fatalf("revision %d after %d", e.Revision, last)
		}
		last = e.Revision
		if e.Workspace == nil {
			// A new one of the same id has its own entry, before or after.
			if f.known[e.RemovedID].UID == e.RemovedUID {
				delete(f.known, e.RemovedID)
			}
			continue
		}
		if e.Workspace.Revision != e.Revision {
			f.h.t.Fatalf("revision %d has a workspace of %d", e.Revision, e.Workspace.Revision)
		}
		f.known[e.Workspace.ID] = *e.Workspace
	}
	if page.Next < last {
		f.h.t.Fatalf("next is %d after %d", page.Next, last)
	}
	f.at = page.Next
}

// check compares what is known with what is there.
func (f *follower) check() {
	f.h.t.Helper()
	ws, _, err := f.h.ListWorkspaces("", 0, nil)
	if err != nil {
		f.h.t.Fatal(err)
	}
	want := map[string]Workspace{}
	for _, w := range ws {
		want[w.ID] = w
	}
	if diff := cmp.Diff(want, f.known); diff != "" {
		f.h.t.Fatalf("the feed's reader does not know what is there: %s", diff)
	}
}

func (h *harness) remove(id string) {
	h.t.Helper()
	w := must(h.DeleteWorkspace(ctx, id, false, Options{}))(h.t).Workspace
	if err := h.FinishDeletion(ctx, id, w.UID); err != nil {
		h.t.Fatal(err)
	}
}

func TestFeed(t *testing.T) {
	h := newHarness(t)
	if page := must(h.Feed(0, 0))(t); len(page.Entries) != 0 || page.More || page.Next != 0 {
		t.Errorf("a new database: got %+v", page)
	}
	f := &follower{h: h}
	f.sync(0)
	for i := range 5 {
		h.create(fmt.Sprint("w", i))
	}
	must(h.RestartWorkspace(ctx, "w1", Options{}))(t)
	h.remove("w2")
	page := must(h.Feed(0, 0))(t)
	var got []string
	for _, e := range page.Entries {
		if e.Workspace != nil {
			got = append(got, fmt.Sprint(e.Revision, " ", e.Workspace.ID))
		} else {
			got = append(got, fmt.Sprint(e.Revision, " -", e.RemovedID))
		}
	}
	// Who begins from nothing is not told what is gone.
	if diff := cmp.Diff([]string{"1 w0", "4 w3", "5 w4", "6 w1"}, got); diff != "" || page.Next != 8 {
		t.Errorf("next is %d, %s", page.Next, diff)
	}
	if n := len(dump(t, h.db)["feed"]); n != 5 {
		t.Errorf("%d rows", n)
	}
	f.follow(2)
	f.check()
	f.sync(2)
	f.check()
	if page := must(h.Feed(8, 0))(t); len(page.Entries) != 0 || page.Next != 8 {
		t.Errorf("at the end: got %+v", page)
	}
	page = must(h.Feed(6, 0))(t)
	if len(page.Entries) != 1 || page.Entries[0].RemovedID != "w2" || page.Entries[0].Revision != 8 || page.Entries[0].RemovedUID == "" {
		t.Errorf("after 6: got %+v", page)
	}

	// The same id again is another workspace.
	h.create("w2")
	f.follow(1)
	f.check()
	h.reopen()
	f.follow(1)
	f.check()
}

func TestFeed_FutureRevision(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	for _, after := range []uint64{2, 1 << 40, ^uint64(0)} {
		if _, err := h.Feed(after, 0); !errors.Is(err, ErrCompacted) {
			t.Errorf("after %d: got %v", after, err)
		}
	}
}

func TestFeed_Compaction(t *testing.T) {
	h := newHarness(t)
	h.create("quiet")
	f := &follower{h: h}
	f.sync(0)
	for i := range 3 {
		h.create(fmt.Sprint("early", i))
		h.remove(fmt.Sprint("early", i))
	}
	early := h.Revision()
	h.clock.Add(maxTombstoneAge - time.Minute)
	h.create("late")
	h.remove("late")
	if _, err := h.Feed(f.at, 0); err != nil {
		t.Errorf("nothing is too old: got %v", err)
	}
	h.clock.Add(2 * time.Minute)
	h.create("latest")
	h.remove("latest")
	if n := len(dump(t, h.db)["removed"]); n != 2 {
		t.Errorf("%d tombstones are left, want 2", n)
	}
	if _, err := h.Feed(f.at, 0); !errors.Is(err, ErrCompacted) {
		t.Errorf("the early ones are forgotten: got %v", err)
	}
	if _, err := h.Feed(early-1, 0); !errors.Is(err, ErrCompacted) {
		t.Errorf("one before the last forgotten one: got %v", err)
	}
	if page := must(h.Feed(early, 0))(t); len(page.Entries) != 2 {
		t.Errorf("got %+v", page)
	}
	h.reopen()
	if _, err := h.Feed(f.at, 0); !errors.Is(err, ErrCompacted) {
		t.Errorf("after a restart: got %v", err)
	}

	// Who reads everything anew gets on with it, however old the entries are.
	f.sync(1)
	f.check()
	h.create("b")
	h.create("c")
	f.follow(1)
	f.check()
	f.at = 0
	f.follow(0)
	f.check()
}

// Pages of a reader who begins from nothing, while others remove.
func TestFeed_SyncDuringRemovals(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	h.create("b")
	h.create("c")
	for i := range 4 {
		h.create(fmt.Sprint("old", i))
		h.remove(fmt.Sprint("old", i))
	}
	h.clock.Add(2 * maxTombstoneAge)
	h.create("x")
	h.remove("x") // forgets the old ones: the floor is above a, b and c
	f := &follower{h: h, known: map[string]Workspace{}}
	since := h.Revision()
	f.apply(must(h.FeedSince(since, 0, 1))(t))
	h.remove("a") // which is known
	h.remove("c") // which is not
	page := must(h.FeedSince(since, f.at, 0))(t)
	f.apply(page)
	f.check()
	if page.More {
		t.Error("there is more")
	}
	f.follow(0)
	f.check()
}

func TestFeed_TombstonesAreBounded(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	for i := range 3 {
		h.create(fmt.Sprint("w", i))
		h.remove(fmt.Sprint("w", i))
	}
	// As if there were as many as there can be.
	tombstones := must(change(ctx, h.Store, false, func(t *txn) (uint64, error) {
		n, err := counter(t.Tx, counterTombstones)
		return n, errors.Join(err, t.putCounter(counterTombstones, maxTombstones))
	}))(t)
	if tombstones != 3 {
		t.Fatalf("%d tombstones are counted", tombstones)
	}
	h.create("x")
	h.remove("x")
	if n := len(dump(t, h.db)["removed"]); n != 3 {
		t.Errorf("%d tombstones are left, want 3", n)
	}
	f := &follower{h: h}
	f.sync(0)
	f.check()
}
