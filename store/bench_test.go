package store

import (
	"fmt"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// BenchmarkCommit compares the writer with what bbolt has: one row a change, by
// one caller and by many.
func BenchmarkCommit(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("writer-%d", callers), func(b *testing.B) {
			h := newHarness(b)
			each(b, callers, func(n int64) error {
				_, err := change(ctx, h.Store, false, func(t *txn) (int, error) { return 0, t.put(bucketTokens, number(uint64(n)), []byte("{}")) })
				return err
			})
		})
		for name, commit := range map[string]func(*bolt.DB, func(*bolt.Tx) error) error{
			"update": (*bolt.DB).Update, "batch": (*bolt.DB).Batch,
		} {
			b.Run(fmt.Sprintf("%s-%d", name, callers), func(b *testing.B) {
				db, err := bolt.Open(filepath.Join(b.TempDir(), "db"), 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType})
				if err != nil {
					b.Fatal(err)
				}
				defer func() { _ = db.Close() }()
				if err := db.Update(func(tx *bolt.Tx) error { _, err := tx.CreateBucket(bucketTokens); return err }); err != nil {
					b.Fatal(err)
				}
				each(b, callers, func(n int64) error {
					return commit(db, func(tx *bolt.Tx) error { return tx.Bucket(bucketTokens).Put(number(uint64(n)), []byte("{}")) })
				})
			})
		}
	}
}

// BenchmarkSetSecret is the whole change: seal, put, generation, feed, audit; and
// the same without the last.
func BenchmarkSetSecret(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) { benchmarkSetSecret(b, callers, true) })
		b.Run(fmt.Sprint(callers, "-unaudited"), func(b *testing.B) { benchmarkSetSecret(b, callers, false) })
	}
}

func benchmarkSetSecret(b *testing.B, callers int, audited bool) {
	h := newHarness(b)
	h.cfg.OnCommit = nil
	h.reopen()
	for i := range 64 {
		h.create(fmt.Sprint("w", i))
	}
	commits := h.ended()
	each(b, callers, func(n int64) error {
		var o Options
		if audited {
			o.Audit = &AuditEntry{
				Subject: "token:deploy-bot", Peer: "10.1.2.3:40506", Method: "workspace.v1.WorkspaceControl/SetSecret",
				Resource: "workspaces/some-workspace/secrets/API_KEY", CallID: "0d9e2a34-8f3b-4a57-9d8c-5a3f1c2b4e6d",
			}
		}
		_, err := h.UpdateSecrets(ctx, in(fmt.Sprint("w", n%64)), set("K", fmt.Sprint(n)), o)
		return err
	})
	b.ReportMetric(float64(b.N)/float64(h.ended()-commits), "ops/commit")
}

func BenchmarkSnapshot(b *testing.B) {
	for _, n := range []int{10, 100} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			h := newHarness(b)
			var u SecretsUpdate
			for i := range n {
				u.Set = append(u.Set, value(fmt.Sprint("K", i), "a value of usual length, like a token"))
			}
			h.create("a", u.Set...)
			for b.Loop() {
				if _, err := h.Snapshot("a"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkGlobalSecret is a change that every workspace sees: how long it takes
// until its caller has the answer, until all is told, and how long a change of one
// workspace waits meanwhile, on average and at most.
func BenchmarkGlobalSecret(b *testing.B) {
	for _, n := range []int{1_000, 10_000, 100_000} {
		for name, policy := range map[string]rolloutPolicy{"": defaultRollouts, "-at-once": {above: 1 << 30, chunk: 1, next: atOnce}} {
			b.Run(fmt.Sprint(n, name), func(b *testing.B) { benchmarkGlobalSecret(b, n, policy) })
		}
	}
}

func benchmarkGlobalSecret(b *testing.B, n int, policy rolloutPolicy) {
	h := newHarness(b)
	fillWorkspaces(h, int64(n))
	var told atomic.Int64
	h.cfg.OnCommit = func(changes []Change) {
		for _, c := range changes {
			if c.Desired {
				told.Add(1)
			}
		}
	}
	h.cfg.rollouts = policy
	h.reopen()
	w := must(h.CreateWorkspace(ctx, NewWorkspace{ID: "other", Secrets: []SecretValue{value("G", "own")}}, Options{}))(h.t).Workspace

	// Another one's status is written all the time.
	var stop atomic.Bool
	var others sync.WaitGroup
	var worst, waited time.Duration
	writes := 0
	others.Go(func() {
		for !stop.Load() {
			begin := time.Now()
			if _, err := h.UpdateStatus(ctx, "other", w.UID, func(_ Workspace, st *Status) { st.Starts++ }); err != nil {
				b.Error(err)
			}
			worst, waited, writes = max(worst, time.Since(begin)), waited+time.Since(begin), writes+1
		}
	})
	var m goruntime.MemStats
	peak, i := uint64(0), 0
	var all time.Duration
	for b.Loop() {
		i++
		begin, before := time.Now(), told.Load()
		if r, err := h.UpdateSecrets(ctx, Scope{}, set("G", fmt.Sprint(i)), Options{}); err != nil || r.Affected != n {
			b.Fatal(r.Affected, err)
		}
		b.StopTimer()
		for told.Load()-before < int64(n) {
			if err := h.Ping(ctx); err != nil {
				b.Fatal(err)
			}
		}
		all += time.Since(begin)
		goruntime.ReadMemStats(&m)
		peak = max(peak, m.HeapSys)
		b.StartTimer()
	}
	stop.Store(true)
	others.Wait()
	b.ReportMetric(float64(all.Milliseconds())/float64(b.N), "ms-until-told")
	b.ReportMetric(float64(waited.Microseconds())/1000/float64(writes), "ms-other")
	b.ReportMetric(float64(worst.Microseconds())/1000, "ms-other-max")
	b.ReportMetric(float64(peak)/(1<<20), "MB-heap")
}

// fillWorkspaces makes n workspaces with three secrets each, without syncing.
func fillWorkspaces(h *harness, n int64) {
	h.db.NoSync = true
	each(nil, 64, func(i int64) error {
		if i > n {
			return errStop
		}
		_, err := h.CreateWorkspace(ctx, NewWorkspace{
			ID: fmt.Sprint("w", i), Spec: Spec{Image: "registry/image:tag", Env: map[string]string{"A": "1", "B": "2"}},
			Secrets: []SecretValue{value("K", "1"), value("L", "2"), value("M", "3")},
		}, Options{})
		return err
	})
}

// BenchmarkOpen is what looking at the whole database costs at a start.
func BenchmarkOpen(b *testing.B) {
	h := newHarness(b)
	const n = 20_000
	fillWorkspaces(h, n)
	h.close()
	for b.Loop() {
		h.open()
		h.close()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/workspace")
}

var errStop = fmt.Errorf("stop")

// each calls f with 1, 2, 3... from many goroutines, b.N times, or, with no b,
// until it fails.
func each(b *testing.B, callers int, f func(n int64) error) {
	var next atomic.Int64
	limit := int64(1 << 62)
	if b != nil {
		limit = int64(b.N)
		b.ResetTimer()
	}
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for n := next.Add(1); n <= limit; n = next.Add(1) {
				if err := f(n); err != nil {
					if b != nil {
						b.Error(err)
					}
					return
				}
			}
		})
	}
	wg.Wait()
	if b != nil {
		b.StopTimer()
	}
}

// BenchmarkHotWorkspace is 64 callers who change one workspace as fast as they
// can, and how long a change of another one takes meanwhile.
func BenchmarkHotWorkspace(b *testing.B) {
	h := newHarness(b)
	h.cfg.OnCommit = nil
	h.reopen()
	h.create("hot")
	h.create("other")
	var stop atomic.Bool
	var other sync.WaitGroup
	var took []time.Duration
	other.Go(func() {
		for !stop.Load() {
			begin := time.Now()
			if _, err := h.RestartWorkspace(ctx, "other", Options{}); err != nil {
				b.Error(err)
			}
			took = append(took, time.Since(begin))
		}
	})
	each(b, 64, func(n int64) error {
		_, err := h.UpdateSecrets(ctx, in("hot"), set("K", fmt.Sprint(n)), Options{})
		return err
	})
	stop.Store(true)
	other.Wait()
	slices.Sort(took)
	var m goruntime.MemStats
	goruntime.ReadMemStats(&m)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "changes/s")
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-other-p50")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "ms-other-p99")
	b.ReportMetric(float64(m.HeapSys)/(1<<20), "MB-heap")
}
