package store

import (
	"bytes"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// Quotas bound what all workspaces take together. What there is, is counted in
// memory, from the rows themselves: once at the start, then by what each commit has
// written, so that no row can disagree.

// Quotas are the most that there can be; 0: no limit. What is there already stays,
// and can be changed as long as it does not grow.
type Quotas struct {
	// Workspaces are those that are being deleted included.
	Workspaces int64
	// Secrets are all secrets, and Bytes is the size of their current values.
	Secrets, Bytes int64
}

// TotalError says which quota a change would exceed.
type TotalError struct {
	// What is one of workspaces, secrets, bytes of secrets.
	What  string
	Limit int64
}

func (e *TotalError) Error() string {
	return fmt.Sprintf("there would be more than %d %s in all", e.Limit, e.What)
}

// Is reports that the error is an ErrTooLarge.
func (e *TotalError) Is(target error) bool { return target == ErrTooLarge }

// over returns which quota is exceeded by what has grown.
func (q *Quotas) over(before, after *Quotas) error {
	for _, x := range []struct {
		what                 string
		limit, before, after int64
	}{
		{"workspaces", q.Workspaces, before.Workspaces, after.Workspaces},
		{"secrets", q.Secrets, before.Secrets, after.Secrets},
		{"bytes of secrets", q.Bytes, before.Bytes, after.Bytes},
	} {
		if x.limit > 0 && x.after > x.limit && x.after > x.before {
			return &TotalError{What: x.what, Limit: x.limit}
		}
	}
	return nil
}

// add adds what a row is of the totals, or takes it away.
func (q *Quotas) add(bucket, key, row []byte, sign int64) {
	if row == nil {
		return
	}
	switch &bucket[0] {
	case &bucketWorkspaces[0]:
		q.Workspaces += sign
	case &bucketSecrets[0]:
		if _, own := ownRow(key); own {
			if sums, _, err := parseOwner(row); err == nil {
				q.Bytes += sign * int64(sums.bytes)
			}
		} else if !bytes.Contains(row, []byte(`"deleted":true`)) { // no text of a caller's is in there
			q.Secrets += sign
		}
	}
}

// countTotals counts what there is.
func countTotals(tx *bolt.Tx) (q Quotas, err error) {
	for _, bucket := range [][]byte{bucketWorkspaces, bucketSecrets} {
		err := tx.Bucket(bucket).ForEach(func(k, v []byte) error {
			q.add(bucket, k, v, 1)
			return nil
		})
		if err != nil {
			return q, err
		}
	}
	return q, nil
}

// counts takes note of a row of the bucket that becomes another one; nil: there is none.
func (t *txn) counts(b *bolt.Bucket, bucket, key, after []byte) {
	if t.store.cfg.Quotas != (Quotas{}) {
		t.totals.add(bucket, key, b.Get(key), -1)
		t.totals.add(bucket, key, after, 1)
	}
}

// hasRoom returns an error if so many more workspaces are more than there may be.
func (t *txn) hasRoom(workspaces int64) error {
	after := t.totals
	after.Workspaces += workspaces
	return t.store.cfg.Quotas.over(&t.totals, &after)
}

// checkQuotas refuses an update of secrets before it writes: one that has to be
// rolled back costs others their commit.
func (t *txn) checkQuotas(p *secretsPlan) error {
	if t.store.cfg.Quotas == (Quotas{}) {
		return nil
	}
	after := t.totals
	after.Bytes += int64(p.sums.bytes - p.bytes)
	for i := range p.sets {
		if !p.owner.has(t.Tx, p.sets[i].value.Key) {
			after.Secrets++
		}
	}
	for i := range p.deletes {
		if p.owner.has(t.Tx, p.deletes[i].key) {
			after.Secrets--
		}
	}
	return t.store.cfg.Quotas.over(&t.totals, &after)
}
