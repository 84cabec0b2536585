package store

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

const year = 365 * 24 * time.Hour

// What was done while the clock was a year ahead lasts no longer than anything
// else, by the clock that goes right, and is not forgotten before.
func TestClock_SetBack(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprint("restart ", restart), func(t *testing.T) {
			h := newHarness(t)
			w := h.create("a", value("K", "1"))
			f := &follower{h: h}
			f.sync(0)

			h.clock.Add(year)
			const n = 3 * purgeRequestsMax
			done := make([]Result, n)
			for i := range n {
				done[i] = must(h.UpdateSecrets(ctx, in("a"), set("K", fmt.Sprint(i)), request(fmt.Sprint(i), "same")))(t)
			}
			for i := range 3 {
				h.create(fmt.Sprint("ahead", i))
				h.remove(fmt.Sprint("ahead", i))
			}
			h.clock.Add(-year)
			if restart {
				h.reopen()
			}

			before := dump(t, h.db)
			for i := range n {
				if diff := cmp.Diff(done[i], must(h.UpdateSecrets(ctx, in("a"), set("K", fmt.Sprint(i)), request(fmt.Sprint(i), "same")))(t)); diff != "" {
					t.Errorf("request %d has another answer: %s", i, diff)
				}
			}
			if diff := cmp.Diff(before["workspaces"], dump(t, h.db)["workspaces"]); diff != "" || h.values("a")["K"] != fmt.Sprint(n-1) {
				t.Errorf("a repeated request was done again: %s", diff)
			}
			f.follow(0) // nobody has missed anything
			f.check()

			// New times are the clock's.
			r := must(h.UpdateWorkspace(ctx, "a", func(e *Editable) error { e.Model = "m"; return nil }, Options{}))(t)
			if now := h.clock.Now(); r.Workspace.UpdateTime.After(now) || now.Sub(r.Workspace.UpdateTime) > time.Minute {
				t.Errorf("updated at %v, it is %v", r.Workspace.UpdateTime, now)
			}
			r.Workspace = must(h.UpdateStatus(ctx, "a", w.UID, func(w Workspace, st *Status) { st.ObservedGeneration = w.Generation }))(t)
			r = must(h.RestartWorkspace(ctx, "a", Options{}))(t)
			if now := h.clock.Now(); r.Workspace.PendingSince.After(now) || now.Sub(r.Workspace.PendingSince) > time.Minute {
				t.Errorf("pending since %v, it is %v", r.Workspace.PendingSince, now)
			}
			h.create("behind")
			h.remove("behind")

			for range 2 * n / purgeRequestsMax { // a few with each commit
				must(h.RestartWorkspace(ctx, "a", Options{}))(t)
			}
			if got := requestRows(t, h); got != n {
				t.Errorf("%d requests are remembered, want %d", got, n)
			}
			if restart {
				h.reopen()
			}
			h.clock.Add(requestAge)
			for range 2 * n / purgeRequestsMax {
				must(h.RestartWorkspace(ctx, "a", Options{}))(t)
			}
			if got := requestRows(t, h); got != 0 {
				t.Errorf("%d requests are remembered after an hour", got)
			}
			must(h.RestartWorkspace(ctx, "a", request("0", "another")))(t)

			if rows := dump(t, h.db)["removed"]; len(rows) != 4 {
				t.Errorf("%d tombstones, want 4", len(rows))
			}
			h.clock.Add(maxTombstoneAge)
			h.create("later")
			h.remove("later")
			if rows := dump(t, h.db)["removed"]; len(rows) != 1 {
				t.Errorf("%d tombstones are left after a day", len(rows))
			}
			h.reopen()
		})
	}
}

// A clock that is set forward makes the store forget sooner what it remembers for
// a time, and nothing else. Set right again, all is as ever.
func TestClock_SetForward(t *testing.T) {
	h := newHarness(t)
	h.create("a", value("K", "1"))
	h.create("gone")
	f := &follower{h: h}
	f.sync(0)
	h.remove("gone")
	must(h.UpdateSecrets(ctx, in("a"), set("K", "2"), request("id", "same")))(t)

	h.clock.Add(year)
	h.create("x")
	h.remove("x") // forgets the older one
	if _, err := h.Feed(f.at, 0); !errors.Is(err, ErrCompacted) {
		t.Errorf("got %v", err)
	}
	f.sync(0)
	f.check()
	if h.values("a")["K"] != "2" {
		t.Errorf("got %v", h.values("a"))
	}
	if n := requestRows(t, h); n != 0 {
		t.Errorf("%d requests are remembered", n)
	}
	must(h.RestartWorkspace(ctx, "a", request("id", "another")))(t)

	h.clock.Add(-year)
	h.create("y")
	h.remove("y")
	f.follow(0)
	f.check()
	if _, err := h.RestartWorkspace(ctx, "a", request("id", "same")); !errors.Is(err, ErrRequestReused) {
		t.Errorf("got %v", err)
	}
	h.reopen()
}

// A machine that has lost its clock begins in 1970, or before it.
func TestClock_BeforeTheEpoch(t *testing.T) {
	for _, now := range []time.Time{time.Unix(0, 0), time.Unix(-1e9, 0), time.Date(1, 1, 1, 0, 0, 0, 1, time.UTC)} {
		h := newHarness(t)
		h.clock.now = now
		h.create("a", value("K", "1"))
		first := must(h.RestartWorkspace(ctx, "a", request("id", "same")))(t)
		if diff := cmp.Diff(first, must(h.RestartWorkspace(ctx, "a", request("id", "same")))(t)); diff != "" {
			t.Errorf("%v: %s", now, diff)
		}
		h.create("b")
		h.remove("b")
		h.reopen()
		h.clock.now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
		h.create("b")
		h.remove("b")
		if n := requestRows(t, h); n != 0 {
			t.Errorf("%v: %d requests are remembered", now, n)
		}
		h.reopen()
	}
}

// Rows of requests and of their ends that do not belong together, which only
// damage leaves, go with time as well.
func TestRequests_StrayRows(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	must(h.RestartWorkspace(ctx, "a", request("id", "one")))(t)
	stray := append(number(nanos(h.clock.Now().Add(year))), "id"...)  // not its end
	nobody := append(number(nanos(h.clock.Now().Add(year))), "no"...) // no such request
	h.edit(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketRequestsByExpiry)
		return errors.Join(b.Put(stray, nil), b.Put(nobody, nil))
	})
	h.reopen()
	must(h.RestartWorkspace(ctx, "a", Options{}))(t)
	if n := requestRows(t, h); n != 1 {
		t.Errorf("%d requests are remembered", n)
	}
	if r := must(h.RestartWorkspace(ctx, "a", request("id", "one")))(t); r.Workspace.Generation != 2 {
		t.Errorf("the request was done again: %+v", r)
	}
}
