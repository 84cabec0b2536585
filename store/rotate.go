package store

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// A rotation makes a new data key, which seals from its commit on. What the older
// ones have sealed the writer seals anew, some rows at a time between other
// changes. When a whole pass over everything has found nothing more to do, the
// older keys are retired, which needs no KEK: what is kept then was wrapped
// together with the new key. A reader who began before the last row was sealed anew
// may still need them: they stay in memory until there is no such reader. Last, the
// file is compacted, see compact.go: its free
// pages still have rows that the old keys open, and the old keys, wrapped.
//
// Where it stands is in meta: keys that are to be retired, or that the file is to
// be compacted. After a crash the pass begins again, and passes over what is done.

const (
	// A part of a pass looks at so many rows, and seals so many of them, or so many
	// bytes, anew: the commit is one like any other.
	scanRows    = 2000
	resealRows  = 128
	resealBytes = 256 << 10
	// upkeepRetry is the wait after one that failed.
	upkeepRetry = 10 * time.Second
)

// ErrKeysInUse: there are as many data keys as there can be. The older ones are
// being retired.
var ErrKeysInUse = errors.New("too many data keys are in use")

// errKeysChanged: the keys are other ones by now.
var errKeysChanged = errors.New("the data keys have changed")

// RotateKey makes a new data key. All that is sealed from now on is sealed with
// it; what is sealed already follows in the background, see Keys.
//
// Errors: ErrKEK when the KEK can't wrap the new key now, which changes nothing;
// ErrKeysInUse; ErrRequestReused; ErrDiskFull.
func (s *Store) RotateKey(ctx context.Context, opts Options) (Result, error) {
	for {
		result, err := s.rotateKey(ctx, opts)
		if !errors.Is(err, errKeysChanged) {
			return result, err
		}
	}
}

func (s *Store) rotateKey(ctx context.Context, opts Options) (Result, error) {
	if result, found, err := s.replayed(opts); err != nil || found {
		return result, err
	}
	asking, cancel := context.WithTimeout(ctx, kekTimeout)
	defer cancel()
	next, err := s.sealer.Rotate(asking, s.cfg.KEK, s.instance)
	var kek *seal.KEKError
	switch {
	case ctx.Err() != nil:
		return Result{}, ctx.Err()
	case errors.As(err, &kek):
		s.cfg.Logger.Warn("no new data key was made: what keeps the key that wraps it does not answer, or refuses", "key", kek.Name, "error", kek.Err)
		return Result{}, fmt.Errorf("%w: %w", ErrKEK, err)
	case errors.Is(err, seal.ErrTooManyKeys):
		return Result{}, ErrKeysInUse
	case err != nil:
		return Result{}, err
	}
	return s.mutate(ctx, opts, func(t *txn) (Result, error) {
		if !s.sealer.Follows(next) {
			return Result{}, errKeysChanged
		}
		stored := storedWrapped{Wrapped: next.Wrapped, RotateTime: t.now}
		if err := t.putRecord(bucketMeta, metaKeys, &stored); err != nil {
			return Result{}, err
		}
		t.after = append(t.after, func() {
			s.sealer.Use(next)
			s.upkeep.discard(s.cfg.Logger)
			s.upkeep = upkeep{ready: s.cfg.upkeep, do: resealing}
		})
		return Result{Changed: true, KeyID: next.Primary()}, nil
	})
}

// replayed finds the result of a request that was done before, so that it is
// answered also when it could not be done again.
func (s *Store) replayed(opts Options) (result Result, found bool, err error) {
	if opts.RequestID == "" {
		return Result{}, false, nil
	}
	err = s.view(func(tx *bolt.Tx) error {
		t, err := s.newTxn(tx)
		if err == nil {
			result, found, err = t.replay(opts.RequestID, opts.fingerprint())
		}
		return err
	})
	return result, found, err
}

// Keys are the database's data keys.
type Keys struct {
	// KEK says where the key is that wraps them.
	KEK string
	// Primary is the id of the one that seals.
	Primary uint32
	// Records counts what is sealed with each while Rotating, else it is 0: secrets,
	// remembered requests, and what guards them.
	Records map[uint32]int64
	// Rotating: the older ones are to be retired. Compacting: they are, and the file
	// is to be rewritten so that nothing is left of what they have sealed.
	Rotating, Compacting bool
	// RotateTime is when the primary was made by a rotation; zero: with the database.
	RotateTime time.Time
	// Problem is why the last try to go on with that has failed; nil: it has not. It
	// is tried again.
	Problem error
}

// Keys returns the data keys and what they are used for. While Rotating it reads
// everything that is sealed, in several transactions; what changes meanwhile is
// counted under one key or the other.
func (s *Store) Keys(ctx context.Context) (keys Keys, err error) {
	keys = Keys{KEK: s.cfg.KEK.Name(), Records: map[uint32]int64{}}
	err = s.view(func(tx *bolt.Tx) error {
		w, _, err := getKeys(tx)
		keys.Rotating, keys.RotateTime = w.Rotating(), w.RotateTime
		keys.Compacting = tx.Bucket(bucketMeta).Get(metaCompact) != nil
		return err
	})
	if problem := s.hindered.Load(); problem != nil {
		keys.Problem = *problem
	}
	keys.Primary = s.sealer.Primary()
	for _, id := range s.sealer.KeyIDs() {
		keys.Records[id] = 0
	}
	for p, more := (place{}), err == nil && keys.Rotating; more && err == nil; {
		if err = ctx.Err(); err != nil {
			break
		}
		err = s.view(func(tx *bolt.Tx) error {
			more = !p.scan(tx, func(_ *sealedRows, _, _ []byte, id uint32) bool {
				keys.Records[id]++
				return true
			})
			return nil
		})
	}
	if err != nil {
		return Keys{}, err
	}
	return keys, nil
}

// sealedRows are rows of a bucket that have something sealed in them.
type sealedRows struct {
	bucket []byte
	// sealed returns what is sealed, nil if nothing is.
	sealed func(key, value []byte) []byte
	// again returns the row with that sealed anew, or ErrUnreadable.
	again func(t *txn, key, value []byte) ([]byte, error)
}

// allSealed are all rows that have something sealed in them.
var allSealed = []sealedRows{
	{bucketMeta, sealedMeta, sealMetaAgain},
	{bucketSealed, func(_, value []byte) []byte { return value }, sealSecretAgain},
	{bucketSecrets, sealedOwner, sealOwnerAgain},
	{bucketRequests, sealedRequest, sealRequestAgain},
}

func sealedMeta(key, value []byte) []byte {
	if bytes.Equal(key, metaCheck) || bytes.Equal(key, metaAuditKey) {
		return value
	}
	return nil
}

func sealedOwner(key, value []byte) []byte {
	if _, own := ownRow(key); own {
		return value[:min(sealBytes, len(value))]
	}
	return nil
}

// sealedRequest takes the fingerprint out of the record, without decoding it all.
func sealedRequest(_, value []byte) []byte {
	_, rest, _ := bytes.Cut(value, []byte(`"fingerprint":"`))
	text, _, _ := bytes.Cut(rest, []byte(`"`))
	sealed, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil {
		return nil
	}
	return sealed
}

func (t *txn) sealAgain(sealed, associated []byte) ([]byte, error) {
	plain, err := t.store.sealer.Open(sealed, associated)
	if err != nil {
		return nil, ErrUnreadable
	}
	return t.store.sealer.Seal(plain, associated)
}

func sealMetaAgain(t *txn, key, value []byte) ([]byte, error) {
	if bytes.Equal(key, metaAuditKey) {
		return t.sealAgain(value, auditKeyAssociated())
	}
	return t.sealAgain(value, checkAssociated())
}

func sealSecretAgain(t *txn, k, value []byte) ([]byte, error) {
	row, version, err := parseValue(k)
	if err != nil {
		return nil, ErrUnreadable
	}
	name, key, _ := bytes.Cut(row, []byte("/"))
	return t.sealAgain(value, ownerNamed(string(name)).associated(string(key), version))
}

func sealOwnerAgain(t *txn, key, _ []byte) ([]byte, error) {
	name, _ := ownRow(key)
	sums, x, err := openOwner(t.Tx, t.store.sealer, string(name))
	if err != nil {
		return nil, ErrUnreadable
	}
	return sealOwner(t.store.sealer, name, &sums, x)
}

func sealRequestAgain(t *txn, id, value []byte) ([]byte, error) {
	var row requestRecord
	if decode(bucketRequests, id, value, &row) != nil {
		return nil, ErrUnreadable
	}
	var err error
	if row.Fingerprint, err = t.sealAgain(row.Fingerprint, requestAssociated(string(id))); err != nil {
		return nil, err
	}
	return json.Marshal(row)
}

// place is how far a pass over all sealed rows has come.
type place struct {
	kind  int    // in allSealed
	after []byte // in its bucket
}

// scan calls f with sealed rows and the ids of their keys, some of them, or until f
// returns false. It reports whether those were the last.
func (p *place) scan(tx *bolt.Tx, f func(kind *sealedRows, key, value []byte, id uint32) bool) (done bool) {
	n := 0
	for ; p.kind < len(allSealed); p.kind, p.after = p.kind+1, nil {
		kind := &allSealed[p.kind]
		c := tx.Bucket(kind.bucket).Cursor()
		var last []byte
		for k, v := c.Seek(append(p.after, 0)); k != nil; k, v = c.Next() {
			if n == scanRows {
				p.after = slices.Clone(last)
				return false
			}
			n++
			last = k
			if id, ok := seal.KeyID(kind.sealed(k, v)); ok && !f(kind, k, v, id) {
				p.after = slices.Clone(last)
				return false
			}
		}
	}
	return true
}

// upkeep is what the writer does between changes.
type upkeep struct {
	ready <-chan time.Time // when to go on; nil: there is nothing to do
	do    task
	pass  pass
	copy  *compaction
}

type task int

const (
	nothing task = iota // but to make sure of what was done
	resealing
	compacting
)

// pass is a pass over everything that is sealed.
type pass struct {
	place      place
	resealed   int
	unreadable int
}

// beginUpkeep takes up what a rotation has begun.
func (s *Store) beginUpkeep(tx *bolt.Tx) error {
	w, _, err := getKeys(tx)
	if err != nil {
		return err
	}
	switch {
	case w.Rotating():
		s.upkeep = upkeep{ready: s.cfg.upkeep, do: resealing}
	case tx.Bucket(bucketMeta).Get(metaCompact) != nil:
		s.upkeep = upkeep{ready: s.cfg.upkeep, do: compacting}
	}
	return nil
}

// keepUp does the next part of the upkeep. If it fails it is tried again.
func (s *Store) keepUp() {
	s.upkeep.ready = s.cfg.upkeep
	err := s.makeReady()
	retry := upkeepRetry
	switch {
	case err != nil:
	case s.upkeep.do == resealing:
		err = s.reseal()
	case s.upkeep.do == compacting:
		retry = compactRetry
		err = s.compact()
	default:
		s.upkeep.ready = nil
	}
	if err == nil {
		s.hindered.Store(nil)
		return
	}
	s.hindered.Store(&err)
	s.cfg.Logger.Warn("what follows a rotation of the data key is not done yet", "error", err, "next_try", retry)
	s.upkeep.ready = time.After(retry)
}

// reseal does the next part of a pass, or what follows the last one.
func (s *Store) reseal() error {
	next, done := s.upkeep.pass, false
	err := s.commitOwn(func(t *txn) (err error) {
		next = s.upkeep.pass
		done, err = t.reseal(&next)
		return err
	})
	switch {
	case err != nil:
		return err
	case !done:
		s.upkeep.pass = next
		return nil
	case next.resealed > 0: // once more, to be sure
		s.upkeep.pass = pass{}
		return nil
	}
	if next.unreadable > 0 {
		s.cfg.Logger.Warn("records that can't be opened were not sealed anew: they stay as they are", "records", next.unreadable)
	}
	return s.commitOwn((*txn).retire)
}

// reseal seals the next rows anew.
func (t *txn) reseal(p *pass) (done bool, err error) {
	type row struct {
		kind            *sealedRows
		key, old, value []byte
	}
	var rows []row
	bytes, primary := 0, t.store.sealer.Primary()
	done = p.place.scan(t.Tx, func(kind *sealedRows, key, value []byte, id uint32) bool {
		if id == primary {
			return true
		}
		again, sealError := kind.again(t, key, value)
		switch {
		case errors.Is(sealError, ErrUnreadable):
			p.unreadable++
			return true
		case sealError != nil:
			err = sealError
			return false
		}
		rows = append(rows, row{kind, slices.Clone(key), value, again})
		bytes += len(again)
		return len(rows) < resealRows && bytes < resealBytes
	})
	if err != nil {
		return false, err
	}
	var grown int64
	for _, r := range rows {
		if slices.Equal(r.kind.bucket, bucketRequests) {
			grown += int64(len(r.value) - len(r.old))
		}
		if err := t.put(r.kind.bucket, r.key, r.value); err != nil {
			return false, err
		}
	}
	p.resealed += len(rows)
	if grown == 0 {
		return done, nil
	}
	var sums requestSums
	if _, err := getRecord(t.Tx, bucketCounters, counterRequests, &sums); err != nil {
		return false, err
	}
	sums.Bytes += grown
	return done, t.putRecord(bucketCounters, counterRequests, &sums)
}

// retire retires all keys but the newest.
func (t *txn) retire() error {
	s := t.store
	stored, _, err := getKeys(t.Tx)
	if err != nil {
		return err
	}
	next, err := s.sealer.Retire(stored.Wrapped)
	if err != nil {
		return err
	}
	stored.Wrapped = next.Wrapped
	if err := t.putRecord(bucketMeta, metaKeys, &stored); err != nil {
		return err
	}
	if err := t.put(bucketMeta, metaCompact, number(1)); err != nil {
		return err
	}
	t.after = append(t.after, func() {
		s.sealer.Use(next)
		s.upkeep = upkeep{ready: s.cfg.upkeep, do: compacting}
		s.cfg.Logger.Info("the older data keys are retired", "key_id", next.Primary())
	})
	return nil
}

// touch takes note of a row that was written.
func (u *upkeep) touch(bucket, key []byte) {
	if u.copy != nil {
		u.copy.touch(bucket, key)
	}
}

// discard gives up a compaction that is not done.
func (u *upkeep) discard(log *slog.Logger) {
	if u.copy != nil {
		u.copy.discard(log)
		u.copy = nil
	}
}
