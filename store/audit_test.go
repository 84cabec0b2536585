package store

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	bolt "go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

// audited are options of a change that is to be in the log.
func audited(method string) Options {
	return Options{Audit: &AuditEntry{Subject: "unix:uid=1000", Method: method, Resource: "workspaces/a", CallID: "call"}}
}

// log returns the whole log, oldest first.
func (h *harness) log() []AuditEntry {
	h.t.Helper()
	if err := h.FlushAudit(ctx); err != nil {
		h.t.Fatal(err)
	}
	entries, _, more, err := h.AuditEntries(0, false, 1<<20, nil)
	if err != nil || more {
		h.t.Fatal(more, err)
	}
	return entries
}

func (h *harness) verify() AuditReport {
	h.t.Helper()
	return must(h.VerifyAudit(ctx))(h.t)
}

func (h *harness) intact() AuditReport {
	h.t.Helper()
	r := h.verify()
	if r.Problems != 0 {
		h.t.Errorf("%d problems: %s", r.Problems, r.Problem)
	}
	return r
}

// brief makes entries comparable: what the calls have done.
func brief(entries []AuditEntry) []string {
	var all []string
	for _, e := range entries {
		all = append(all, fmt.Sprintf("%d %s %s %s gen %d x%d", e.Sequence, e.Method, e.Code, e.Effect, e.Generation, e.Calls()))
	}
	return all
}

// Each change is in the log by its own commit; what changes nothing costs none, and
// comes with the next one that is made for the log.
func TestAudit_WithItsChange(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	commits := h.ended()
	step := func(name string, want uint64, do func() error) {
		t.Helper()
		before := h.ended()
		if err := do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if n := h.ended() - before; n != want {
			t.Errorf("%s made %d commits, want %d", name, n, want)
		}
	}
	repeated := audited("repeat")
	repeated.RequestID = "id"
	validated := audited("validate")
	validated.ValidateOnly = true
	step("set", 1, func() error { _, err := h.UpdateSecrets(ctx, in("a"), set("K", "1"), audited("set")); return err })
	step("the same", 0, func() error { _, err := h.UpdateSecrets(ctx, in("a"), set("K", "1"), audited("set")); return err })
	step("validated", 0, func() error { _, err := h.RestartWorkspace(ctx, "a", validated); return err })
	step("under an id", 1, func() error { _, err := h.RestartWorkspace(ctx, "a", repeated); return err })
	step("repeated", 0, func() error { _, err := h.RestartWorkspace(ctx, "a", repeated); return err })
	step("durable by itself", 1, func() error { return h.Audit(ctx, AuditEntry{Method: "fetch", Code: "OK"}) })
	if _, err := h.RestartWorkspace(ctx, "none", audited("fails")); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	step("flush", 1, func() error { return h.FlushAudit(ctx) })
	step("nothing left", 0, func() error { return h.FlushAudit(ctx) })
	if h.ended() != commits+4 {
		t.Errorf("%d commits", h.ended()-commits)
	}
	want := []string{
		"1 set OK CHANGED gen 2 x1", "2 repeat OK CHANGED gen 3 x1", "3 fetch OK  gen 0 x1",
		"4 set OK UNCHANGED gen 2 x1", "5 validate OK VALIDATED gen 3 x1", "6 repeat OK REPEATED gen 3 x1",
	}
	if diff := cmp.Diff(want, brief(h.log())); diff != "" {
		t.Error(diff)
	}
	first := h.log()[0]
	if first.Subject != "unix:uid=1000" || first.Resource != "workspaces/a" || first.CallID != "call" || first.Time.IsZero() {
		t.Errorf("got %+v", first)
	}
	before := h.intact()
	h.reopen()
	if after := h.intact(); after != before {
		t.Errorf("after a restart it is %+v, was %+v", after, before)
	}
}

// A change whose commit fails is not in the log, and what waits is not lost by it.
// Close writes what still waits.
func TestAudit_FailedCommit(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	fail := false
	h.around = func(ctx context.Context, _ string, do func(context.Context) error) error {
		if fail {
			return syscall.ENOSPC
		}
		return do(ctx)
	}
	h.AuditLater(AuditEntry{Method: "refused", Code: "PERMISSION_DENIED"})
	fail = true
	if _, err := h.RestartWorkspace(ctx, "a", audited("restart")); !errors.Is(err, ErrDiskFull) {
		t.Errorf("got %v", err)
	}
	if err := h.Audit(ctx, AuditEntry{Method: "fetch", Code: "OK"}); !errors.Is(err, ErrDiskFull) {
		t.Errorf("got %v", err)
	}
	if err := h.FlushAudit(ctx); !errors.Is(err, ErrDiskFull) {
		t.Errorf("got %v", err)
	}
	h.AuditLater(AuditEntry{Method: "refused", Code: "PERMISSION_DENIED"})
	fail = false
	h.reopen()
	if diff := cmp.Diff([]string{"1 refused PERMISSION_DENIED  gen 0 x2"}, brief(h.log())); diff != "" {
		t.Error(diff)
	}
	h.intact()
}

// Who waits for nothing has its entry written after a moment all the same, and after
// a failure it is tried again.
func TestAudit_WrittenLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		fails := 2
		h.around = func(ctx context.Context, _ string, do func(context.Context) error) error {
			if fails--; fails >= 0 {
				return syscall.ENOSPC
			}
			return do(ctx)
		}
		h.AuditLater(AuditEntry{Method: "refused", Code: "UNAUTHENTICATED"})
		begin := time.Now()
		<-h.AuditWritten()
		if took := time.Since(begin); took != auditWindow+2*auditRetry {
			t.Errorf("it took %v", took)
		}
		h.intact()
		h.close()
	})
}

// However many calls are refused, and however much they differ: each is counted,
// and neither memory nor log grow with them.
func TestAudit_Flood(t *testing.T) {
	h := newHarness(t)
	const calls, methods = 20_000, 5
	for i := range calls {
		e := AuditEntry{Method: fmt.Sprint("m", i%methods), Code: []string{"UNAUTHENTICATED", "INVALID_ARGUMENT"}[i%2], Peer: fmt.Sprintf("[fd00::%x]:%d", i/8, i), CallID: fmt.Sprint(i)}
		switch i % 4 {
		case 0:
			e.Resource = fmt.Sprint("workspaces/w", i)
		case 1:
			e.Subject, e.Resource = fmt.Sprint("token:", i%100), fmt.Sprint("workspaces/w", i)
		}
		h.AuditLater(e)
		if n := len(h.audit.queue); n > auditRoom[1].known+2*methods {
			t.Fatalf("%d entries wait", n)
		}
	}
	entries := h.log()
	h.AuditLater(AuditEntry{Method: "m", Code: "OK", Peer: "10.0.0.1:1", CallID: "first"})
	h.AuditLater(AuditEntry{Method: "m", Code: "OK", Peer: "10.0.0.1:2", CallID: "second"})
	counted := map[string]int64{}
	entries = append(entries, h.log()[len(entries):]...)
	for _, e := range entries {
		counted[e.Method+" "+e.Code] += e.Calls()
		if e.Count > 0 && !e.LastTime.After(e.Time) {
			t.Errorf("%v calls from %v to %v", e.Count, e.Time, e.LastTime)
		}
	}
	want := map[string]int64{"m OK": 2}
	for i := range calls {
		want[fmt.Sprint("m", i%methods)+" "+[]string{"UNAUTHENTICATED", "INVALID_ARGUMENT"}[i%2]]++
	}
	if diff := cmp.Diff(want, counted); diff != "" {
		t.Error(diff)
	}
	last := entries[len(entries)-1]
	if last.CallID != "first" || last.Peer != "10.0.0.1:1" {
		t.Errorf("the last entry is %+v", last)
	}
	h.intact()
}

// One who is refused all the time, each time about something else, does not push what
// others did out of the log: his entries come at a pace, and say less. Each call is
// counted, and who comes when it is over is written about in full.
func TestAudit_FloodForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHarness(t)
		const perSecond, flood = 20, time.Hour
		calls := int64(0)
		for range int(flood / time.Second) {
			for range perSecond {
				calls++
				h.AuditLater(AuditEntry{Method: "get", Code: "PERMISSION_DENIED", Subject: "workspace:x", Resource: fmt.Sprint("workspaces/w", calls)})
			}
			<-time.After(time.Second)
		}
		<-time.After(2 * auditHold)
		most := auditBurst + int((flood+2*auditHold)/auditPace)
		entries := h.log()
		if len(entries) > most || len(entries) < auditBurst/2 {
			t.Errorf("%d entries of %d calls, want at most %d", len(entries), calls, most)
		}
		for _, e := range entries {
			calls -= e.Calls()
		}
		if calls != 0 {
			t.Errorf("%d calls are not counted", calls)
		}
		h.AuditLater(AuditEntry{Method: "get", Code: "PERMISSION_DENIED", Subject: "someone", Resource: "workspaces/a"})
		<-time.After(auditHold)
		if last := h.log()[len(entries):]; len(last) != 1 || last[0].Resource != "workspaces/a" {
			t.Errorf("got %+v", last)
		}
		h.intact()
		h.close()
	})
}

// fillAudit writes a log by changes and refusals.
func (h *harness) fillAudit(n int) {
	h.t.Helper()
	for i := range n {
		h.clock.Add(time.Second)
		if i%3 == 2 {
			h.AuditLater(AuditEntry{Method: fmt.Sprint("refused", i), Code: "PERMISSION_DENIED"})
			continue
		}
		must(h.UpdateSecrets(ctx, in("a"), set("K", fmt.Sprint(h.clock.Now())), audited(fmt.Sprint("set", i))))(h.t)
	}
	if err := h.FlushAudit(ctx); err != nil {
		h.t.Fatal(err)
	}
}

// rows returns the log's rows by number.
func (h *harness) rows() map[uint64][]byte {
	h.t.Helper()
	rows := map[uint64][]byte{}
	for k, v := range dump(h.t, h.db)["audit"] {
		n := must(parseNumber(bucketAudit, nil, []byte(k)))(h.t)
		rows[n] = []byte(v)
	}
	return rows
}

// tampering is one who can write the file, and has no key.
var tampering = map[string]func(rt *rapid.T, rows map[uint64][]byte){
	"a byte is another": func(rt *rapid.T, rows map[uint64][]byte) {
		row := rows[drawRow(rt, rows, "row")]
		row[rapid.IntRange(0, len(row)-1).Draw(rt, "byte")] ^= byte(rapid.IntRange(1, 255).Draw(rt, "xor"))
	},
	"a row is cut": func(rt *rapid.T, rows map[uint64][]byte) {
		n := drawRow(rt, rows, "row")
		rows[n] = rows[n][:rapid.IntRange(0, len(rows[n])-1).Draw(rt, "size")]
	},
	"a row is missing": func(rt *rapid.T, rows map[uint64][]byte) { delete(rows, drawRow(rt, rows, "row")) },
	"two have changed places": func(rt *rapid.T, rows map[uint64][]byte) {
		a, b := drawRow(rt, rows, "a"), drawRow(rt, rows, "b")
		if a == b {
			rt.Skip("one and the same")
		}
		rows[a], rows[b] = rows[b], rows[a]
	},
	"the newest are missing": func(rt *rapid.T, rows map[uint64][]byte) {
		all := slices.Sorted(maps.Keys(rows))
		for _, n := range all[rapid.IntRange(0, len(all)-1).Draw(rt, "keep"):] {
			delete(rows, n)
		}
	},
	"the oldest are missing": func(rt *rapid.T, rows map[uint64][]byte) {
		all := slices.Sorted(maps.Keys(rows))
		for _, n := range all[:rapid.IntRange(1, len(all)).Draw(rt, "remove")] {
			delete(rows, n)
		}
	},
	"one was added": func(rt *rapid.T, rows map[uint64][]byte) {
		all := slices.Sorted(maps.Keys(rows))
		last := all[len(all)-1]
		forged := []byte(`{"time":"2026-01-02T03:04:05Z","method":"m","code":"OK"}`)
		hash := auditHash(rows[last][:32], last+1, forged)
		rows[last+1] = append(hash[:], forged...)
	},
	"one is far away": func(_ *rapid.T, rows map[uint64][]byte) { rows[1<<64-1] = []byte("x") },
	"all later hashes fit": func(rt *rapid.T, rows map[uint64][]byte) {
		all := slices.Sorted(maps.Keys(rows))
		from := rapid.IntRange(1, len(all)-1).Draw(rt, "from")
		var e AuditEntry
		if err := json.Unmarshal(rows[all[from]][32:], &e); err != nil {
			rt.Fatal(err)
		}
		e.Subject = "somebody else"
		forged, err := json.Marshal(&e)
		if err != nil {
			rt.Fatal(err)
		}
		rows[all[from]] = append(make([]byte, 32), forged...)
		for i := from; i < len(all); i++ {
			hash := auditHash(rows[all[i-1]][:32], all[i], rows[all[i]][32:])
			copy(rows[all[i]], hash[:])
		}
	},
}

func drawRow(rt *rapid.T, rows map[uint64][]byte, label string) uint64 {
	return rapid.SampledFrom(slices.Sorted(maps.Keys(rows))).Draw(rt, label)
}

// Whatever is done to the rows behind the store's back: verifying finds it, now and
// after a restart and after more was written, the store opens and goes on, and what
// it writes from then on is whole.
func TestAudit_TamperingIsFound(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	h.fillAudit(20)
	h.cfg.Audit.MaxAge = 8 * time.Second
	h.reopen()
	if err := h.PruneAudit(ctx); err != nil {
		t.Fatal(err)
	}
	good := dump(t, h.db)
	if r := h.intact(); r.First == 1 || r.Last < r.First+4 {
		t.Fatalf("got %+v", r)
	}
	rapid.Check(t, func(rt *rapid.T) {
		defer func() { h.t = t }()
		h.t = rt
		h.db.NoSync = true
		h.put(good)
		rows := h.rows()
		tampering[rapid.SampledFrom(slices.Sorted(maps.Keys(tampering))).Draw(rt, "tampering")](rt, rows)
		tampered := maps.Clone(good)
		tampered["audit"] = map[string]string{}
		for n, row := range rows {
			tampered["audit"][string(number(n))] = string(row)
		}
		h.put(tampered)
		found := h.verify()
		if found.Problems == 0 {
			rt.Fatal("nothing was found")
		}
		if rapid.Bool().Draw(rt, "restart") {
			h.reopen()
			h.db.NoSync = true
			if r := h.verify(); r != found {
				rt.Errorf("after a restart: %+v, before: %+v", r, found)
			}
		}
		must(h.RestartWorkspace(ctx, "a", audited("after")))(rt)
		h.AuditLater(AuditEntry{Method: "refused after", Code: "PERMISSION_DENIED"})
		entries := h.log()
		if r := h.verify(); r.Problems == 0 {
			rt.Error("nothing is found after more was written")
		}
		newest := entries[len(entries)-2:]
		if newest[0].Method != "after" || newest[1].Method != "refused after" || newest[1].Sequence != newest[0].Sequence+1 {
			rt.Errorf("the newest are %v", brief(newest))
		}
		// Once what was found has gone, the log is whole. A row whose time was made to be
		// in the future stays until there is no room.
		h.clock.Add(10 * time.Second)
		must(h.RestartWorkspace(ctx, "a", audited("last")))(rt)
		if err := h.PruneAudit(ctx); err != nil {
			rt.Fatal(err)
		}
		left := h.log()
		if r := h.verify(); (r.Problems != 0 || r.Last != r.First) && !left[0].Time.After(h.clock.Now().Add(-h.cfg.Audit.MaxAge)) {
			rt.Errorf("after all that is gone: %+v, %v", r, brief(left))
		}
	})
}

// put makes the database what it was.
func (h *harness) put(rows map[string]map[string]string) {
	h.t.Helper()
	h.edit(func(tx *bolt.Tx) error {
		for name, want := range rows {
			b := tx.Bucket([]byte(name))
			var keys [][]byte
			if err := b.ForEach(func(k, _ []byte) error { keys = append(keys, bytes.Clone(k)); return nil }); err != nil {
				return err
			}
			for _, k := range keys {
				if err := b.Delete(k); err != nil {
					return err
				}
			}
			for k, v := range want {
				if err := b.Put([]byte(k), []byte(v)); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// What meta says of the log is found to be wrong as well: another's record, an older
// one, none, and a key that can't be opened.
func TestAudit_RecordIsFound(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	h.fillAudit(5)
	older := []byte(dump(t, h.db)["counters"]["audit"])
	h.fillAudit(5)
	good := dump(t, h.db)
	forged := &auditState{}
	if err := json.Unmarshal([]byte(good["counters"]["audit"]), forged); err != nil {
		t.Fatal(err)
	}
	forged.MAC = forged.mac(make([]byte, 32), h.InstanceUID())
	for name, edit := range map[string]func(counters, meta *bolt.Bucket) error{
		"older":   func(counters, meta *bolt.Bucket) error { return counters.Put(counterAudit, older) },
		"none":    func(counters, meta *bolt.Bucket) error { return counters.Delete(counterAudit) },
		"nothing": func(counters, meta *bolt.Bucket) error { return counters.Put(counterAudit, []byte("null")) },
		"forged": func(counters, meta *bolt.Bucket) error {
			return counters.Put(counterAudit, must(encodeRecord(forged))(t))
		},
		"no key": func(counters, meta *bolt.Bucket) error { return meta.Delete(metaAuditKey) },
		"a key":  func(counters, meta *bolt.Bucket) error { return meta.Put(metaAuditKey, []byte("0123456789")) },
	} {
		t.Run(name, func(t *testing.T) {
			h.put(good)
			h.edit(func(tx *bolt.Tx) error { return edit(tx.Bucket(bucketCounters), tx.Bucket(bucketMeta)) })
			h.reopen()
			for range 3 {
				if r := h.verify(); r.Problems == 0 || r.Problem == "" {
					t.Errorf("nothing was found: %+v", r)
				}
				must(h.RestartWorkspace(ctx, "a", audited("after")))(t)
				h.reopen()
			}
			var damage []AuditEntry
			for _, e := range h.log() {
				if e.Method == AuditDamageMethod {
					damage = append(damage, e)
				}
			}
			if len(damage) != 1 || damage[0].Code != AuditDamageCode || damage[0].Time.IsZero() {
				t.Errorf("the log tells of the damage by %+v", damage)
			}
		})
	}
}

// A log that has reached its size loses its oldest entries and stays whole.
func TestAudit_PrunedBySize(t *testing.T) {
	h := newHarness(t)
	h.cfg.Audit.MaxBytes = 20_000
	h.reopen()
	h.db.NoSync = true
	h.create("a")
	for i := range 300 {
		must(h.RestartWorkspace(ctx, "a", audited(strings.Repeat("m", 1+i%200))))(t)
		if r := h.verify(); r.Problems != 0 || r.Bytes > h.cfg.Audit.MaxBytes || r.Last != uint64(i+1) {
			t.Fatalf("after %d: %+v", i, r)
		}
	}
	r := h.verify()
	if r.First < 100 || r.Bytes < h.cfg.Audit.MaxBytes/2 {
		t.Errorf("got %+v", r)
	}
	sum := 0
	for _, row := range h.rows() {
		sum += len(row)
	}
	if int64(sum) != r.Bytes || len(h.rows()) != int(r.Last-r.First+1) {
		t.Errorf("there are %d rows of %d bytes: %+v", len(h.rows()), sum, r)
	}
	h.reopen()
	h.intact()
}

func TestAudit_PrunedByAge(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	h.fillAudit(6)
	h.clock.Add(time.Hour)
	h.fillAudit(3)
	h.cfg.Audit.MaxAge = 30 * time.Minute
	h.reopen()
	for range 2 {
		if err := h.PruneAudit(ctx); err != nil {
			t.Fatal(err)
		}
		if r := h.intact(); r.First != 7 || r.Last != 9 {
			t.Errorf("got %+v", r)
		}
	}
	h.clock.Add(time.Hour)
	if err := h.PruneAudit(ctx); err != nil {
		t.Fatal(err)
	}
	if r := h.intact(); r.First != 10 || r.Last != 9 || r.Bytes != 0 {
		t.Errorf("of an empty log: %+v", r)
	}
	h.reopen()
	h.fillAudit(1)
	if r := h.intact(); r.First != 10 || r.Last != 10 {
		t.Errorf("got %+v", r)
	}
}

func TestAudit_Entries(t *testing.T) {
	h := newHarness(t)
	h.db.NoSync = true
	h.create("a")
	h.fillAudit(11)
	all := h.log()
	odd := func(e *AuditEntry) bool { return e.Sequence%2 == 1 }
	for _, down := range []bool{false, true} {
		for _, match := range []func(*AuditEntry) bool{nil, odd} {
			for limit := 1; limit < 13; limit++ {
				var want, got []AuditEntry
				for _, e := range all {
					if match == nil || match(&e) {
						want = append(want, e)
					}
				}
				if down {
					slices.Reverse(want)
				}
				for last, more := uint64(0), true; more; {
					var page []AuditEntry
					var err error
					page, last, more, err = h.AuditEntries(last, down, limit, match)
					if err != nil || len(page) > limit || more && len(page) < limit {
						t.Fatal(len(page), more, err)
					}
					got = append(got, page...)
				}
				if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
					t.Errorf("down %v, limit %d: %s", down, limit, diff)
				}
			}
		}
	}
	// A search that finds little ends before it has seen everything, and says where.
	h.edit(func(tx *bolt.Tx) error {
		for n := uint64(12); n < 50_000; n++ {
			if err := tx.Bucket(bucketAudit).Put(number(n), nil); err != nil {
				return err
			}
		}
		return nil
	})
	calls := 0
	for last, more := uint64(0), true; more; calls++ {
		var page []AuditEntry
		page, last, more, _ = h.AuditEntries(last, false, 10, func(e *AuditEntry) bool { return e.Sequence == 49_999 })
		if more && len(page) > 0 {
			t.Error("it has found something and not the end")
		}
	}
	if calls != 3 {
		t.Errorf("%d calls", calls)
	}
}

// What was copied elsewhere is remembered with the next entry, and by Close.
func TestAudit_Copied(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	h.fillAudit(3)
	saved := func() uint64 {
		st := &auditState{}
		must(0, h.view(func(tx *bolt.Tx) error { _, err := getRecord(tx, bucketCounters, counterAudit, st); return err }))(t)
		return st.Copied
	}
	h.SetAuditCopied(3)
	if n := saved(); n != 0 {
		t.Errorf("at once: %d", n)
	}
	h.fillAudit(1)
	if n := saved(); n != 3 {
		t.Errorf("with the next entry: %d", n)
	}
	h.SetAuditCopied(4)
	h.reopen()
	if n := h.AuditCopied(); n != 4 || saved() != 4 {
		t.Errorf("after Close: %d", n)
	}
	h.intact()
}

// Anyone can check a copy of the log: a hash is SHA-256 over the one before it, the
// number as 8 bytes, and the entry's JSON.
func TestAudit_HashesCanBeChecked(t *testing.T) {
	h := newHarness(t)
	h.create("a")
	h.fillAudit(5)
	before := make([]byte, 32)
	for _, e := range h.log() {
		hash := auditHash(before, e.Sequence, must(json.Marshal(&e))(t))
		if hash != e.Hash {
			t.Errorf("entry %d has %s, want %x", e.Sequence, hex.EncodeToString(e.Hash[:]), hash)
		}
		before = hash[:]
	}
}
