package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
)

// maxBatch bounds how many operations share a commit.
const maxBatch = 256

// op is one caller's change on its way through the writer.
type op struct {
	run      func(*txn) error
	rehearse bool // only to see what it would do

	claimed    atomic.Bool   // by the writer, to run it, or by its caller, who gives up
	committing chan struct{} // closed when its commit begins: it does not run any more
	done       chan error    // buffered: the writer never waits for a caller

	err     error
	changes []Change
	entries []AuditEntry
}

// txn is a write transaction that several operations share. Each operation
// checks all it can before it writes: one that fails after having written
// (dirty) costs the others a second run.
type txn struct {
	*bolt.Tx
	store    *Store
	now      time.Time
	begun    uint64       // the newest revision before
	revision uint64       // the newest one by now
	begins   bool         // a rollout
	dirty    bool         // the operation has written
	totals   Quotas       // of what there is by now
	changes  []Change     // of the operation
	entries  []AuditEntry // of the operation
	flush    bool         // the commit takes the audit log's queue along
	after    []func()     // what the writer does once it is committed
	scratch  []byte       // encode's
}

// put writes a row, unless it is there just so: each page that a commit need not
// write makes it faster.
func (t *txn) put(bucket, key, value []byte) error {
	if old := t.Bucket(bucket).Get(key); old != nil && bytes.Equal(old, value) {
		return nil
	}
	return t.renew(bucket, key, value)
}

// renew is put for a row that is another one than what is there, if anything is: it
// does not look.
func (t *txn) renew(bucket, key, value []byte) error {
	b := t.Bucket(bucket)
	t.counts(b, bucket, key, value)
	t.dirty = true
	t.store.upkeep.touch(bucket, key)
	return b.Put(key, value)
}

func (t *txn) putRecord(bucket, key []byte, v record) error {
	b, err := t.encode(v)
	if err != nil {
		return err
	}
	return t.put(bucket, key, b)
}

// encode is encodeRecord without room to spare: bbolt keeps rows until the commit.
func (t *txn) encode(v record) (_ []byte, err error) {
	t.scratch, err = appendRecord(t.scratch[:0], v)
	return slices.Clone(t.scratch), err
}

func (t *txn) delete(bucket, key []byte) error {
	b := t.Bucket(bucket)
	t.counts(b, bucket, key, nil)
	t.dirty = true
	t.store.upkeep.touch(bucket, key)
	return b.Delete(key)
}

func (t *txn) putCounter(key []byte, n uint64) error { return t.put(bucketCounters, key, number(n)) }

// change runs f in a write transaction and returns its result once that is
// durable. f may run more than once; of its runs only the last one counts. A
// caller whose context ends before f has begun gets the context's error, and f
// never runs. One whose context ends during the commit gets it together with
// ErrInDoubt: a hung disk holds up no caller who has a deadline. In no case does
// f run after change has returned.
func change[T any](ctx context.Context, s *Store, rehearse bool, f func(*txn) (T, error)) (T, error) {
	var result, none T
	o := &op{rehearse: rehearse, committing: make(chan struct{}), done: make(chan error, 1)}
	o.run = func(t *txn) (err error) {
		result, err = f(t)
		return err
	}
	if err := ctx.Err(); err != nil {
		return none, err
	}
	select {
	case s.ops <- o:
	case <-ctx.Done():
		return none, ctx.Err()
	case <-s.closing:
		return none, ErrClosed
	}
	if err := o.wait(ctx); err != nil {
		return none, err
	}
	return result, nil
}

// claim reports whether it is the first one's: who runs the operation, or gives
// it up.
func (o *op) claim() bool { return o.claimed.CompareAndSwap(false, true) }

// wait returns the outcome of an operation that the writer has.
func (o *op) wait(ctx context.Context) error {
	select {
	case err := <-o.done:
		return err
	case <-ctx.Done():
	}
	if o.claim() {
		return ctx.Err()
	}
	select { // it runs, which takes no more than a moment
	case err := <-o.done:
		return err
	case <-o.committing:
	}
	select {
	case err := <-o.done:
		return err
	default:
		return fmt.Errorf("%w: %w", ErrInDoubt, ctx.Err())
	}
}

// write is the writer's goroutine: it takes what waits and commits it together.
// Nobody who is alone waits for company; company gathers during a commit.
func (s *Store) write() {
	defer s.closeAllReplaced()
	defer s.upkeep.discard(s.cfg.Logger)
	var audit <-chan time.Time // when the audit log's queue is due
	for {
		var batch []*op
		select {
		case o := <-s.ops:
			batch = append(batch, o)
		case <-s.rolling.ready:
			s.rollOut()
			continue
		case <-s.audit.queued:
			if audit == nil {
				audit = time.After(auditWindow)
			}
			continue
		case <-audit:
			audit = s.flushAudit(false)
			continue
		case <-s.upkeep.ready:
			s.keepUp()
			continue
		case <-s.replaced.ready:
			s.closeReplaced()
			continue
		case <-s.pings:
			continue
		case <-s.closing:
			s.flushAudit(true)
			s.saveCopied()
			return
		}
		// Lets those whom the last commit has woken come back in time.
		runtime.Gosched()
	drain:
		for len(batch) < maxBatch {
			select {
			case o := <-s.ops:
				batch = append(batch, o)
			default:
				break drain
			}
		}
		s.process(batch)
	}
}

// process runs the operations in the order in which they came, but those that
// were given up meanwhile.
func (s *Store) process(batch []*op) {
	for len(batch) > 0 {
		n := slices.IndexFunc(batch, func(o *op) bool { return o.rehearse })
		switch n {
		case 0:
			if batch[0].claim() {
				s.rehearse(batch[0])
			}
			batch = batch[1:]
			continue
		case -1:
			n = len(batch)
		}
		// Before any is claimed: it may take as long as the disk likes, and whoever
		// has a deadline can still give up.
		err := s.makeReady()
		claimed := slices.DeleteFunc(slices.Clone(batch[:n]), func(o *op) bool { return !o.claim() })
		batch = batch[n:]
		if err == nil {
			s.commit(claimed)
			continue
		}
		for _, o := range claimed {
			o.done <- translate(err)
		}
	}
}

// makeReady is ready, guarded and watched like a commit.
func (s *Store) makeReady() error {
	defer s.watchdog.watch()()
	return guard(s.ready)
}

// rehearse runs an operation and rolls it back.
func (s *Store) rehearse(o *op) {
	tx, err := s.begin(true)
	if err == nil {
		err = guard(func() error {
			t, err := s.newTxn(tx)
			if err != nil {
				return err
			}
			t.totals = s.totals
			return o.run(t)
		})
		s.rollback(tx)
	}
	o.done <- translate(err)
}

// commit runs the operations in one transaction. One that fails is answered
// with its error and harms no other.
func (s *Store) commit(batch []*op) {
	for len(batch) > 0 {
		spoiled, err := s.attempt(batch)
		if spoiled >= 0 {
			o := batch[spoiled]
			o.done <- translate(o.err)
			batch = slices.Delete(batch, spoiled, spoiled+1)
			continue
		}
		for _, o := range batch {
			if err != nil {
				o.err = err
			}
			o.done <- translate(o.err)
		}
		return
	}
}

// errClean: nothing was written, so there is nothing to commit.
var errClean = errors.New("clean")

// attempt runs and commits the batch. It returns the index of an operation
// because of which all had to be rolled back, or -1 and the commit's outcome.
func (s *Store) attempt(batch []*op) (spoiled int, err error) {
	tx, err := s.begin(true)
	if err != nil {
		return -1, err
	}
	txid := tx.ID()
	var t *txn
	var queued []AuditEntry // of the audit log
	wroteAudit := false
	spoiled = -1
	err = guard(func() (err error) {
		if t, err = s.newTxn(tx); err != nil {
			return err
		}
		t.totals = s.totals
		wrote := false
		for i, o := range batch {
			t.dirty, t.changes, t.entries = false, nil, nil
			o.err = guard(func() error { return o.run(t) })
			if o.err != nil && t.dirty {
				spoiled = i
				return o.err
			}
			o.changes, o.entries = t.changes, t.entries
			if o.err != nil {
				o.entries = nil
			}
			wrote = wrote || t.dirty
		}
		if t.flush {
			queued = s.audit.take()
		}
		if !wrote && len(queued) == 0 {
			return errClean
		}
		entries := queued
		for _, o := range batch {
			entries = append(entries, o.entries...)
		}
		wroteAudit = len(entries) > 0
		if err := t.finish(entries); err != nil {
			return err
		}
		for _, o := range batch {
			close(o.committing)
		}
		defer s.watchdog.watch()()
		s.commits.Add(1)
		defer s.commits.Add(1)
		return s.cfg.Around(s.life, stepCommit, func(context.Context) error { return s.commitTx(tx) })
	})
	if err != nil {
		s.rollback(tx)
	}
	switch {
	case spoiled >= 0:
		return spoiled, nil
	case errors.Is(err, errClean):
		return -1, nil
	case err != nil && (t == nil || !s.visible(txid)):
		s.audit.giveBack(queued)
		return -1, err
	}
	// The last case is a commit whose final sync failed: readers see it, though
	// it may not be durable. Its callers get the error, and the actors look.
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrInDoubt, err)
		s.inDoubt = true
	}
	s.revision.Store(t.revision)
	s.totals = t.totals
	if t.begins && s.rolling.ready == nil {
		s.rolling.ready = s.cfg.rollouts.next
	}
	for _, f := range t.after {
		f()
	}
	var changes []Change
	for _, o := range batch {
		changes = append(changes, o.changes...)
	}
	s.tell(changes)
	if wroteAudit {
		s.audit.wrote()
	}
	return -1, err
}

// ready makes sure that what is written next counts.
func (s *Store) ready() error {
	if err := s.checkFile(); err != nil {
		return err
	}
	if s.inDoubt {
		if err := s.settle(); err != nil {
			return fmt.Errorf("an earlier commit can't be made sure of: %w", err)
		}
		s.inDoubt = false
	}
	return s.keepName()
}

// commitOwn is change for the writer itself, which is ready.
func (s *Store) commitOwn(f func(*txn) error) error {
	o := &op{run: f, committing: make(chan struct{}), done: make(chan error, 1)}
	s.commit([]*op{o})
	return <-o.done
}

// commitTx commits. If bbolt panics there, as on a damaged page, its last word
// was not written, and it must not go on.
func (s *Store) commitTx(tx *bolt.Tx) error {
	txid := tx.ID()
	err := guard(tx.Commit)
	var paniced *PanicError
	switch {
	case errors.As(err, &paniced):
		return s.stopWriting(err)
	case err != nil:
		return fmt.Errorf("database %s can't be written: %w", s.cfg.Path, err)
	}
	s.committed(txid)
	return nil
}

// tell tells a commit's changes. A panic there is not the writer's end.
func (s *Store) tell(changes []Change) {
	if s.cfg.OnCommit == nil || len(changes) == 0 {
		return
	}
	var paniced *PanicError
	if err := guard(func() error { s.cfg.OnCommit(changes); return nil }); errors.As(err, &paniced) {
		s.cfg.Logger.Error("who is told of changes has panicked", "panic", paniced.Value, "stack", string(paniced.Stack))
	}
}

// visible reports whether a transaction whose commit failed can be read all the
// same. Its number tells: it may have written what gives no new revision.
func (s *Store) visible(txid int) bool {
	var newest int
	err := s.view(func(tx *bolt.Tx) error {
		newest = tx.ID()
		return nil
	})
	if err != nil || newest != txid {
		return false
	}
	s.committed(txid)
	return true
}

func (s *Store) newTxn(tx *bolt.Tx) (*txn, error) {
	revision, err := counter(tx, counterRevision)
	if err != nil {
		return nil, err
	}
	return &txn{Tx: tx, store: s, now: s.cfg.Now().UTC().Round(0), begun: revision, revision: revision}, nil
}

// finish is what every commit does once. The entries are for the audit log.
func (t *txn) finish(entries []AuditEntry) error {
	if t.revision != t.begun {
		if err := t.putCounter(counterRevision, t.revision); err != nil {
			return err
		}
	}
	if len(entries) > 0 {
		if err := t.appendAudit(entries); err != nil {
			return err
		}
	}
	return t.purgeRequests()
}
