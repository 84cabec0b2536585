package store

import (
	"context"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// A change of global secrets gives every workspace that sees it a new generation.
// Where there are some thousands of workspaces that is one transaction, like any
// other change. Where there are more it would hold up everybody else for seconds.
// Then the transaction has, beside the values, one row in rollouts, and that row
// is the new generation of all of them: whoever reads a workspace whose record is
// older than the row adds it, see takeIn. The writer rewrites the records
// afterwards, some at a time, and tells of them; when all are done the row goes.
//
// It makes no difference when a record takes the change in: whether it sees it
// depends on the record and on secrets of the workspace's own, and who changes
// either writes the record, which takes the change in first.

const (
	// maxRollouts is how many there are at most: each costs every reader a look.
	maxRollouts = 8
	// rolloutRetry is the wait after a transaction that failed.
	rolloutRetry = 10 * time.Second
)

// rolloutPolicy says how changes are rolled out.
type rolloutPolicy struct {
	above int              // of how many workspaces all get their generation at once
	chunk int              // how many records a transaction of a rollout looks at
	next  <-chan time.Time // when there is the next one
}

var defaultRollouts = rolloutPolicy{above: 2000, chunk: 250, next: atOnce}

// rollout is a row of rollouts. Its key is its revision.
type rollout struct {
	revision uint64
	// Keys are the global secrets that have changed, and Time is when.
	Keys []string  `json:"keys"`
	Time time.Time `json:"time"`
	// Live: running containers take it in.
	Live bool `json:"live,omitempty"`
}

func (r *rollout) valid([]byte) bool { return len(r.Keys) > 0 && !r.Time.IsZero() }

// rolloutsOf returns the rollouts that are not done, oldest first.
func rolloutsOf(tx *bolt.Tx) (rollouts []rollout, err error) {
	c := tx.Bucket(bucketRollouts).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		var r rollout
		if r.revision, err = parseNumber(bucketRollouts, k, k); err != nil {
			return nil, err
		}
		if err := decode(bucketRollouts, k, v, &r); err != nil {
			return nil, err
		}
		rollouts = append(rollouts, r)
	}
	return rollouts, nil
}

// takeIn gives a workspace the generations of the rollouts that its record is
// older than, and reports whether there are any.
func takeIn(tx *bolt.Tx, w *Workspace, rollouts []rollout) (changed bool) {
	for _, r := range rollouts {
		if w.Revision < r.revision && sees(tx, w, r.Keys) {
			r.bump(w)
			changed = true
		}
	}
	return changed
}

func (r *rollout) bump(w *Workspace) {
	if r.Live {
		bumpLive(w, ReasonGlobalSecret, r.Time)
		return
	}
	bump(w, ReasonGlobalSecret, r.Time)
}

// sees reports whether a change of one of these global secrets reaches the
// workspace: it has no secret of its own under the key, nor the model, and is not
// being deleted.
func sees(tx *bolt.Tx, w *Workspace, keys []string) bool {
	if w.Deleting != nil {
		return false
	}
	var hidden []string // by the model, which wins
	if w.Model != "" {
		hidden = w.Spec.ModelVars()
	}
	own := ownerOf(w)
	return slices.ContainsFunc(keys, func(key string) bool {
		return !slices.Contains(hidden, key) && !own.has(tx, key)
	})
}

// reach is how many workspaces there are, and how many of them see a change.
type reach struct{ all, see int }

// reachOf returns the reach of a change of global secrets. It is read in several
// transactions, like a list, while others go on; what they change meanwhile is
// counted or not.
func (s *Store) reachOf(ctx context.Context, u *SecretsUpdate) (n reach, err error) {
	if u.NextStart {
		return n, nil
	}
	var keys []string
	err = s.view(func(tx *bolt.Tx) error {
		t, err := s.newTxn(tx)
		if err != nil {
			return err
		}
		p, err := t.planSecrets(owner{}, nil, u, "")
		if err == nil {
			keys = p.changedKeys()
		}
		return err
	})
	for after, more := "", err == nil && len(keys) > 0; more && err == nil && ctx.Err() == nil; {
		err = s.view(func(tx *bolt.Tx) (err error) {
			after, more, err = eachWorkspace(tx, after, listChunk, func(w *Workspace) {
				n.all++
				if sees(tx, w, keys) {
					n.see++
				}
			})
			return err
		})
	}
	return n, err
}

// eachWorkspace calls f with at most limit workspaces whose id comes after the
// given one; f copies what it keeps. It returns the last one's id, and whether
// there may be more.
func eachWorkspace(tx *bolt.Tx, after string, limit int, f func(*Workspace)) (last string, more bool, err error) {
	rollouts, err := rolloutsOf(tx)
	if err != nil {
		return "", false, err
	}
	var w Workspace
	return eachRow(tx, after, limit, func(id, row []byte) error {
		w = Workspace{}
		if err := decode(bucketWorkspaces, id, row, &w); err != nil {
			return err
		}
		takeIn(tx, &w, rollouts)
		f(&w)
		return nil
	})
}

// eachRow is eachWorkspace for the rows.
func eachRow(tx *bolt.Tx, after string, limit int, f func(id, row []byte) error) (last string, more bool, err error) {
	c := tx.Bucket(bucketWorkspaces).Cursor()
	lastID := []byte(after)
	k, v := c.Seek(append([]byte(after), 0))
	for ; k != nil && limit > 0; k, v = c.Next() {
		if err := f(k, v); err != nil {
			return "", false, err
		}
		lastID = k
		limit--
	}
	return string(lastID), k != nil, nil
}

// putRollout begins a rollout.
func (t *txn) putRollout(r rollout) error {
	t.revision++
	t.begins = true
	return t.putRecord(bucketRollouts, number(t.revision), &r)
}

// rolling is where the writer is with the rollouts.
type rolling struct {
	// ready is when to go on; nil: there are none.
	ready <-chan time.Time
	// Of the rollouts up to newest the records up to after are done.
	newest uint64
	after  string
}

// atOnce is ready whenever it is looked at.
var atOnce = func() <-chan time.Time {
	c := make(chan time.Time)
	close(c)
	return c
}()

// rollOut does the next part of the rollouts. If it fails it is tried again.
func (s *Store) rollOut() {
	next := s.rolling
	err := s.makeReady()
	if err == nil {
		err = s.commitOwn(func(t *txn) (err error) {
			next, err = t.rollOut(s.rolling)
			return err
		})
	}
	if err != nil {
		s.cfg.Logger.Warn("a change of global secrets is not rolled out yet", "error", err, "next_try", rolloutRetry)
		s.rolling.ready = time.After(rolloutRetry)
		return
	}
	s.rolling = next
}

func (t *txn) rollOut(r rolling) (next rolling, err error) {
	rollouts, err := rolloutsOf(t.Tx)
	if err != nil || len(rollouts) == 0 {
		return rolling{}, err
	}
	if r.after == "" {
		r.newest = rollouts[len(rollouts)-1].revision
	}
	var changed []Workspace
	c := t.Bucket(bucketWorkspaces).Cursor()
	k, v := c.Seek(append([]byte(r.after), 0))
	for range t.store.cfg.rollouts.chunk {
		if k == nil {
			break
		}
		var w Workspace
		// A damaged record keeps no other from its generation.
		if decode(bucketWorkspaces, k, v, &w) == nil && takeIn(t.Tx, &w, rollouts) {
			changed = append(changed, w)
		}
		r.after = string(k)
		k, v = c.Next()
	}
	for i := range changed {
		if err := t.putWorkspace(&changed[i], Change{Desired: true}); err != nil {
			return rolling{}, err
		}
	}
	r.ready = t.store.cfg.rollouts.next
	if k != nil {
		return r, nil
	}
	// Those that came meanwhile need another round.
	for _, done := range rollouts {
		if done.revision <= r.newest {
			if err := t.delete(bucketRollouts, number(done.revision)); err != nil {
				return rolling{}, err
			}
		}
	}
	r.after = ""
	if rollouts[len(rollouts)-1].revision == r.newest {
		r.ready = nil
	}
	return r, nil
}
