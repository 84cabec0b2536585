package store

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// BenchmarkCommit compares the writer with what bbolt has: one row a change, by
// one caller and by many.
func BenchmarkCommit(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("writer-%d", callers), func(b *testing.B) {
			h := newHarness(b)
			each(b, callers, func(n int64) error {
				_, err := change(ctx, h.Store, false, func(t *txn) (int, error) { return 0, t.put(bucketOwners, number(uint64(n)), []byte("{}")) })
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
				if err := db.Update(func(tx *bolt.Tx) error { _, err := tx.CreateBucket(bucketOwners); return err }); err != nil {
					b.Fatal(err)
				}
				each(b, callers, func(n int64) error {
					return commit(db, func(tx *bolt.Tx) error { return tx.Bucket(bucketOwners).Put(number(uint64(n)), []byte("{}")) })
				})
			})
		}
	}
}

// BenchmarkSetSecret is the whole change: seal, put, generation, feed.
func BenchmarkSetSecret(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			h := newHarness(b)
			h.cfg.OnCommit = nil
			h.reopen()
			for i := range 64 {
				h.create(fmt.Sprint("w", i))
			}
			commits := h.commits.Load()
			each(b, callers, func(n int64) error {
				_, err := h.UpdateSecrets(ctx, in(fmt.Sprint("w", n%64)), set("K", fmt.Sprint(n)), Options{})
				return err
			})
			b.ReportMetric(float64(b.N)/float64(h.commits.Load()-commits), "ops/commit")
		})
	}
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

// BenchmarkGlobalSecret is one transaction over every workspace.
func BenchmarkGlobalSecret(b *testing.B) {
	h := newHarness(b)
	const n = 10_000
	fillWorkspaces(h, n)
	h.cfg.OnCommit = nil
	h.reopen()
	i := 0
	for b.Loop() {
		i++
		if r, err := h.UpdateSecrets(ctx, Scope{}, set("G", fmt.Sprint(i)), Options{}); err != nil || r.Affected != n {
			b.Fatal(r.Affected, err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/workspace")
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
