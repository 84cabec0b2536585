package store

import (
	"errors"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// How many removed workspaces the feed remembers, for how long, and how many
// tombstones at most one removal prunes.
const (
	maxTombstones      = 10_000
	maxTombstoneAge    = 24 * time.Hour
	pruneTombstonesMax = 16
)

// feedRow is a row of the change feed: a workspace's id, or a tombstone.
type feedRow struct {
	ID string `json:"id"`
	// UID and RemoveTime are a tombstone's.
	UID        string    `json:"uid,omitempty"`
	RemoveTime time.Time `json:"removeTime,omitzero"`
}

// FeedPage is a part of the change feed.
type FeedPage struct {
	Entries []FeedEntry
	// More: there is more to read now.
	More bool
	// Next is where to go on: the revision of the last entry, or, at the end, of
	// the newest commit. Always go on from here and never from the last entry: a
	// feed that has nothing but old entries would else seem compacted.
	Next uint64
}

// FeedEntry is the newest state of one workspace.
type FeedEntry struct {
	Revision uint64
	// Workspace is nil when it was removed.
	Workspace *Workspace
	// RemovedID and RemovedUID tell which one was removed.
	RemovedID, RemovedUID string
}

// Feed returns the newest state of each workspace whose Revision is greater than
// after, in order of Revision, at most limit of them (0: all). After 0 it is
// everything that is there. It returns ErrCompacted when tombstones newer than
// after were pruned, or when after is newer than the database, which was
// restored from a backup then: read everything again.
//
// Whoever reads everything in pages uses FeedSince, which can't fall behind.
func (s *Store) Feed(after uint64, limit int) (FeedPage, error) {
	since := after
	if after == 0 {
		since = s.Revision()
	}
	return s.FeedSince(since, after, limit)
}

// FeedSince is Feed for a reader who has read everything up to after, having
// begun from nothing when since was the store's Revision: what was removed
// before that need not be told. The first page is FeedSince(s.Revision(), 0,
// n), the next ones FeedSince(same since, page.Next, n); once More is false go
// on with Feed(page.Next, n).
func (s *Store) FeedSince(since, after uint64, limit int) (page FeedPage, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		newest, err := counter(tx, counterRevision)
		if err != nil {
			return err
		}
		floor, err := counter(tx, counterFloor)
		if err != nil {
			return err
		}
		if since < floor || since > newest || after > newest {
			return ErrCompacted
		}
		page = FeedPage{Next: newest}
		c := tx.Bucket(bucketFeed).Cursor()
		for k, v := c.Seek(number(after + 1)); k != nil; k, v = c.Next() {
			if limit > 0 && len(page.Entries) == limit {
				page.More = true
				page.Next = page.Entries[limit-1].Revision
				return nil
			}
			var row feedRow
			if err := decode(bucketFeed, k, v, &row); err != nil {
				return err
			}
			revision, err := parseNumber(bucketFeed, k, k)
			if err != nil {
				return err
			}
			e := FeedEntry{Revision: revision}
			if !row.RemoveTime.IsZero() {
				if e.Revision <= since {
					continue // gone before the reader began
				}
				e.RemovedID, e.RemovedUID = row.ID, row.UID
			} else {
				w, err := getWorkspace(tx, row.ID)
				if errors.Is(err, ErrNotFound) {
					err = &RowError{string(bucketFeed), string(k)}
				}
				if err != nil {
					return err
				}
				e.Workspace = &w
			}
			page.Entries = append(page.Entries, e)
		}
		return nil
	})
	if err != nil {
		return FeedPage{}, err
	}
	return page, nil
}

// nextRevision moves a workspace's row in the feed to a new revision.
func (t *txn) nextRevision(old uint64, row feedRow) (uint64, error) {
	if old != 0 {
		if err := t.delete(bucketFeed, number(old)); err != nil {
			return 0, err
		}
	}
	b, err := t.encode(&row)
	if err != nil {
		return 0, err
	}
	t.revision++
	return t.revision, t.renew(bucketFeed, number(t.revision), b)
}

// putTombstone takes a workspace out of the feed.
func (t *txn) putTombstone(w *Workspace) error {
	revision, err := t.nextRevision(w.Revision, feedRow{ID: w.ID, UID: w.UID, RemoveTime: t.now})
	if err != nil {
		return err
	}
	t.changes = append(t.changes, Change{ID: w.ID, UID: w.UID, Revision: revision})
	if err := t.bringBackRemoved(); err != nil {
		return err
	}
	if err := t.put(bucketRemoved, number(revision), number(nanos(t.now))); err != nil {
		return err
	}
	count, err := counter(t.Tx, counterTombstones)
	if err != nil {
		return err
	}
	if err := t.putCounter(counterTombstones, count+1); err != nil {
		return err
	}
	return t.pruneTombstones()
}

// parseRemoved reads a row of the tombstones: when it was removed.
func parseRemoved(k, v []byte) (time.Time, error) {
	if len(k) != 8 {
		return time.Time{}, &RowError{string(bucketRemoved), string(k)}
	}
	n, err := parseNumber(bucketRemoved, k, v)
	return time.Unix(0, int64(n)), err
}

// bringBackRemoved gives tombstones of the future the present time: the clock
// was set back since. So their times never fall, and none is kept for longer
// than a day of the clock as it goes now.
func (t *txn) bringBackRemoved() error {
	var future [][]byte
	c := t.Bucket(bucketRemoved).Cursor()
	for k, v := c.Last(); k != nil; k, v = c.Prev() {
		removed, err := parseRemoved(k, v)
		if err != nil {
			return err
		}
		if !removed.After(t.now) {
			break
		}
		future = append(future, slices.Clone(k))
	}
	for _, k := range future {
		if err := t.put(bucketRemoved, k, number(nanos(t.now))); err != nil {
			return err
		}
	}
	return nil
}

// pruneTombstones forgets the oldest removed workspaces and raises the floor.
func (t *txn) pruneTombstones() error {
	count, err := counter(t.Tx, counterTombstones)
	if err != nil {
		return err
	}
	horizon := t.now.Add(-maxTombstoneAge)
	c := t.Bucket(bucketRemoved).Cursor()
	var old [][]byte
	for k, v := c.First(); k != nil && len(old) < pruneTombstonesMax; k, v = c.Next() {
		removed, err := parseRemoved(k, v)
		if err != nil {
			return err
		}
		if count-uint64(len(old)) <= maxTombstones && !removed.Before(horizon) {
			break
		}
		old = append(old, slices.Clone(k))
	}
	if len(old) == 0 {
		return nil
	}
	for _, k := range old {
		if err := t.delete(bucketRemoved, k); err != nil {
			return err
		}
		if err := t.delete(bucketFeed, k); err != nil {
			return err
		}
	}
	if err := t.putCounter(counterTombstones, count-uint64(len(old))); err != nil {
		return err
	}
	return t.put(bucketCounters, counterFloor, old[len(old)-1])
}
