package store

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

func request(id, fingerprint string) Options {
	return Options{RequestID: id, Fingerprint: []byte(fingerprint)}
}

func TestRequests_Repeated(t *testing.T) {
	calls := map[string]struct {
		before func(*harness)
		do     func(*harness, Options) (Result, error)
	}{
		"create": {nil, func(h *harness, o Options) (Result, error) {
			return h.CreateWorkspace(ctx, NewWorkspace{ID: "n", Spec: Spec{Image: "img"}, Secrets: []SecretValue{value("K", "1")}}, o)
		}},
		"update": {nil, func(h *harness, o Options) (Result, error) {
			return h.UpdateWorkspace(ctx, "a", func(e *Editable) error { e.Model += "x"; return nil }, o)
		}},
		"update nothing": {nil, func(h *harness, o Options) (Result, error) {
			return h.UpdateWorkspace(ctx, "a", func(*Editable) error { return nil }, o)
		}},
		"delete":  {nil, func(h *harness, o Options) (Result, error) { return h.DeleteWorkspace(ctx, "a", true, o) }},
		"restart": {nil, func(h *harness, o Options) (Result, error) { return h.RestartWorkspace(ctx, "a", o) }},
		"stop":    {nil, func(h *harness, o Options) (Result, error) { return h.StopWorkspace(ctx, "a", o) }},
		"start": {func(h *harness) { must(h.StopWorkspace(ctx, "a", Options{}))(h.t) },
			func(h *harness, o Options) (Result, error) { return h.StartWorkspace(ctx, "a", o) }},
		"secrets": {nil, func(h *harness, o Options) (Result, error) {
			return h.UpdateSecrets(ctx, in("a"), set("K", "2", "L", "3"), o)
		}},
		"global secrets": {nil, func(h *harness, o Options) (Result, error) {
			return h.UpdateSecrets(ctx, Scope{}, set("G", "2"), o)
		}},
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.create("a", value("K", "1"))
			if call.before != nil {
				call.before(h)
			}
			first := must(call.do(h, request("id", "one")))(t)

			again := func() {
				t.Helper()
				before := dump(t, h.db)
				h.record.take()
				second := must(call.do(h, request("id", "one")))(t)
				if diff := cmp.Diff(first, second); diff != "" {
					t.Errorf("another answer: %s", diff)
				}
				if _, err := call.do(h, request("id", "two")); !errors.Is(err, ErrRequestReused) {
					t.Errorf("another request: got %v", err)
				}
				if diff := cmp.Diff(before, dump(t, h.db)); diff != "" || h.record.take() != nil {
					t.Errorf("the database changed: %s", diff)
				}
			}
			again()
			h.reopen()
			again()
			// Also when the world has moved on.
			if w, err := h.Workspace("a"); err == nil && w.Deleting == nil {
				must(h.DeleteWorkspace(ctx, "a", false, Options{}))(t)
			}
			w := must(h.Workspace("a"))(t)
			if err := h.FinishDeletion(ctx, "a", w.UID); err != nil {
				t.Fatal(err)
			}
			again()
			h.clock.Add(requestAge - time.Minute)
			again()

			h.clock.Add(2 * time.Minute)
			h.create("a")
			if _, err := call.do(h, request("id", "two")); errors.Is(err, ErrRequestReused) {
				t.Errorf("after its end: got %v", err)
			}
		})
	}
}

func TestRequests_NotRemembered(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	validate := request("id", "one")
	validate.ValidateOnly = true
	must(h.RestartWorkspace(ctx, "a", validate))(t)
	if _, err := h.RestartWorkspace(ctx, "n", request("id", "two")); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if n := len(dump(t, h.db)["requests"]); n != 0 {
		t.Errorf("%d requests are remembered", n)
	}
	if r := must(h.RestartWorkspace(ctx, "a", request("id", "three")))(t); r.Workspace.Generation != 2 {
		t.Errorf("got %+v", r)
	}
	validate.Fingerprint = []byte("three")
	if r := must(h.RestartWorkspace(ctx, "a", validate))(t); r.Workspace.Generation != 2 {
		t.Errorf("validate only, of one that was done: got %+v", r)
	}
}

// requestRows checks that the rows belong together, and counts them.
func requestRows(t *testing.T, h *harness) int {
	t.Helper()
	var sums requestSums
	rows := dump(t, h.db)
	var size int
	for _, row := range rows["requests"] {
		size += len(row)
	}
	if err := h.view(func(tx *bolt.Tx) error {
		_, err := getRecord(tx, bucketCounters, counterRequests, &sums)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	n := len(rows["requests"])
	if len(rows["requests_by_expiry"]) != n || sums.Count != int64(n) || sums.Bytes != int64(size) {
		t.Fatalf("%d requests, %d by expiry, sums %+v", n, len(rows["requests_by_expiry"]), sums)
	}
	return n
}

func TestRequests_ArePurged(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	for i := range 3 * purgeRequestsMax {
		must(h.StartWorkspace(ctx, "a", request(fmt.Sprint(i), "")))(t)
	}
	if n := requestRows(t, h); n != 3*purgeRequestsMax {
		t.Fatalf("%d requests", n)
	}
	h.clock.Add(requestAge)
	for want := 2 * purgeRequestsMax; want >= 0; want -= purgeRequestsMax {
		must(h.RestartWorkspace(ctx, "a", Options{}))(t)
		if n := requestRows(t, h); n != want {
			t.Fatalf("%d requests are left, want %d", n, want)
		}
	}
	// One that takes an expired one's place.
	must(h.StartWorkspace(ctx, "a", request("id", "one")))(t)
	h.clock.Add(requestAge)
	must(h.StartWorkspace(ctx, "a", request("id", "two")))(t)
	if n := requestRows(t, h); n != 1 {
		t.Errorf("%d requests", n)
	}
}

// However many requests come within the hour, what is remembered is bounded:
// the oldest go.
func TestRequests_AreBounded(t *testing.T) {
	h := newHarness(t)
	must(h.CreateWorkspace(ctx, NewWorkspace{ID: "a", Spec: Spec{Image: strings.Repeat("x", 1<<20)}}, Options{}))(t)
	for i := range 3 {
		must(h.StartWorkspace(ctx, "a", request(fmt.Sprint(i), "")))(t)
	}
	setSums := func(f func(*requestSums)) {
		h.edit(func(tx *bolt.Tx) error {
			tn := &txn{Tx: tx, store: h.Store}
			var sums requestSums
			if _, err := getRecord(tx, bucketCounters, counterRequests, &sums); err != nil {
				return err
			}
			f(&sums)
			return tn.putRecord(bucketCounters, counterRequests, &sums)
		})
	}
	left := func(want ...string) {
		t.Helper()
		rows := dump(t, h.db)["requests"]
		if len(rows) != len(want) {
			t.Fatalf("%d requests are left", len(rows))
		}
		for _, id := range want {
			if rows[id] == "" {
				t.Errorf("%s is not remembered", id)
			}
		}
	}
	// As if so many others were there.
	setSums(func(s *requestSums) { s.Count += maxRequests - 3 })
	must(h.StartWorkspace(ctx, "a", request("3", "")))(t)
	left("1", "2", "3")
	setSums(func(s *requestSums) { s.Count = 3; s.Bytes += maxRequestBytes - 4<<20 })
	must(h.StartWorkspace(ctx, "a", request("4", "")))(t)
	left("2", "3", "4")
}
