package store

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// The audit log is one row a call, in the order in which they were written. Each
// row begins with a hash over the hash before it, its own number and its content,
// so that no row can be changed, moved, taken out or put in without every later
// hash being another one. The record in counters says where the log begins and ends,
// with the hashes there, under a MAC whose key is sealed: who can write the file,
// but has no key, can't make a log that fits it, a shorter one neither.
//
// What changes something is written in the transaction of the change: there is no
// change without its entry. What changes nothing costs no commit of its own and
// waits a moment for others, see auditqueue.go.

// AuditEntry is what the audit log says of a call, or of several alike. It never
// holds a secret's value, nor anything that a caller may have mistaken for
// another field: callers of the store see to that.
type AuditEntry struct {
	// Sequence counts the entries, from 1, without a gap.
	Sequence uint64 `json:"-"`
	// Hash binds the entry to its content and to all entries before it.
	Hash [sha256.Size]byte `json:"-"`

	// Time is when the call ended, of several the first one.
	Time time.Time `json:"time"`
	// Subject is who made the call; empty: nobody who is known.
	Subject string `json:"subject,omitempty"`
	// Peer is the address that it came from.
	Peer string `json:"peer,omitempty"`
	// Method is the RPC, like workspace.v1.WorkspaceControl/SetSecret.
	Method string `json:"method"`
	// Resource is the name of what the call was about, and Keys are the secrets of
	// a call about several.
	Resource string   `json:"resource,omitempty"`
	Keys     []string `json:"keys,omitempty"`
	// Code is the gRPC code's name, and Reason that of the google.rpc.ErrorInfo.
	Code   string `json:"code"`
	Reason string `json:"reason,omitempty"`
	// Effect is what the call has done; empty for one that failed, and for one
	// that changed nothing in the store.
	Effect AuditEffect `json:"effect,omitempty"`
	// Generation is the workspace's after the call.
	Generation int64 `json:"generation,omitempty"`
	// RequestID is the caller's, CallID the one in the daemon's log.
	RequestID string `json:"requestID,omitempty"`
	CallID    string `json:"callID,omitempty"`
	// Count is how many calls the entry stands for, if more than one, and LastTime
	// when the last of them ended. They have everything in common that the entry
	// tells, but for CallID and RequestID, which are the first one's.
	Count    int64     `json:"count,omitempty"`
	LastTime time.Time `json:"lastTime,omitzero"`
}

// Calls is how many calls the entry stands for.
func (e *AuditEntry) Calls() int64 { return max(1, e.Count) }

// AuditEffect is what a call has done. The values are those of
// workspace.v1.AuditEffect without the prefix.
type AuditEffect string

// The effects.
const (
	// AuditChanged: the change was made.
	AuditChanged AuditEffect = "CHANGED"
	// AuditUnchanged: everything had the asked-for value.
	AuditUnchanged AuditEffect = "UNCHANGED"
	// AuditValidated: it was only asked what would be (Options.ValidateOnly).
	AuditValidated AuditEffect = "VALIDATED"
	// AuditRepeated: it was done before, under the same request id.
	AuditRepeated AuditEffect = "REPEATED"
)

// What an entry says that the store itself makes: damage of the log was found, and
// this is the first entry after it.
const (
	AuditDamageMethod = "audit"
	AuditDamageCode   = "DATA_LOSS"
	AuditDamageReason = "AUDIT_LOG_DAMAGED"
)

// AuditPolicy bounds the audit log.
type AuditPolicy struct {
	// MaxBytes is how much its rows may take; 0: DefaultAuditBytes. Older ones go.
	MaxBytes int64
	// MaxAge is how long a row is kept, see PruneAudit; 0: for as long as there is
	// room.
	MaxAge time.Duration
}

// DefaultAuditBytes is room for about 150,000 entries.
const DefaultAuditBytes = 64 << 20

const (
	// auditSlack is by how much a log that is too large is cut at once, so that not
	// every entry that comes costs one that goes.
	auditSlack = 64 << 10
	// auditChunk is how many rows a transaction reads or removes at most.
	auditChunk = 1000
)

// auditState is the record in counters: which rows there are.
type auditState struct {
	First  uint64    `json:"first"`            // the oldest entry's number; Next if there is none
	Next   uint64    `json:"next"`             // the next one's
	Anchor string    `json:"anchor"`           // the hash before First, in hex; empty: not known
	Head   string    `json:"head"`             // the newest hash
	Bytes  int64     `json:"bytes,omitempty"`  // of all rows
	Oldest time.Time `json:"oldest,omitzero"`  // First's time
	Copied uint64    `json:"copied,omitempty"` // up to where Config's owner has copied it
	MAC    string    `json:"mac"`              // over all of the above
}

func (st *auditState) valid([]byte) bool { return st.First > 0 && st.Next >= st.First && st.Bytes >= 0 }

func newAuditState() *auditState {
	zero := hex.EncodeToString(make([]byte, sha256.Size))
	return &auditState{First: 1, Next: 1, Anchor: zero, Head: zero}
}

func (st *auditState) mac(key []byte, instance string) string {
	h := hmac.New(sha256.New, key)
	h.Write(seal.AssociatedData("workspaced audit log", instance,
		strconv.FormatUint(st.First, 10), strconv.FormatUint(st.Next, 10), st.Anchor, st.Head,
		strconv.FormatInt(st.Bytes, 10), strconv.FormatInt(st.Oldest.UnixNano(), 10), strconv.FormatUint(st.Copied, 10)))
	return hex.EncodeToString(h.Sum(nil))
}

func (st *auditState) genuine(key []byte, instance string) bool {
	return hmac.Equal([]byte(st.MAC), []byte(st.mac(key, instance)))
}

func auditKeyAssociated() []byte { return seal.AssociatedData("workspaced audit key") }

// initAudit begins the log: with a key of its own, and empty. The bucket is that of
// the record of where it begins and ends.
func initAudit(tx *bolt.Tx, sealer *seal.Sealer, instance string, bucket []byte) error {
	key := make([]byte, sha256.Size)
	_, _ = rand.Read(key) // never fails
	sealed, err := sealer.Seal(key, auditKeyAssociated())
	if err != nil {
		return err
	}
	st := newAuditState()
	st.MAC = st.mac(key, instance)
	row, err := encodeRecord(st)
	if err != nil {
		return err
	}
	return errors.Join(tx.Bucket(bucketMeta).Put(metaAuditKey, sealed), tx.Bucket(bucket).Put(counterAudit, row))
}

// loadAuditKey reads the key of the MAC. If it can't be opened the log is damaged,
// which is no reason not to start: there is a new key, under which nothing that is
// there is genuine, and the next entry will say so.
func (s *Store) loadAuditKey() error {
	err := s.db.View(func(tx *bolt.Tx) error {
		key, err := s.sealer.Open(tx.Bucket(bucketMeta).Get(metaAuditKey), auditKeyAssociated())
		s.audit.key = key
		return err
	})
	if err == nil {
		return nil
	}
	s.cfg.Logger.Error("the key of the audit log can't be opened: there is a new one, and the log counts as damaged", "database", s.cfg.Path)
	key := make([]byte, sha256.Size)
	_, _ = rand.Read(key) // never fails
	sealed, err := s.sealer.Seal(key, auditKeyAssociated())
	if err != nil {
		return err
	}
	s.audit.key = key
	return s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketMeta).Put(metaAuditKey, sealed) })
}

// auditHash is the hash of an entry: of the one before it, its number and its
// JSON.
func auditHash(before []byte, sequence uint64, entry []byte) [sha256.Size]byte {
	h := sha256.New()
	h.Write(before)
	h.Write(number(sequence))
	h.Write(entry)
	return [sha256.Size]byte(h.Sum(nil))
}

// parseAudit takes a row apart; ok is false when it is none.
func parseAudit(k, v []byte) (sequence uint64, hash, entry []byte, ok bool) {
	sequence, err := parseNumber(bucketAudit, k, k)
	if err != nil || len(v) <= sha256.Size {
		return sequence, make([]byte, sha256.Size), nil, false
	}
	return sequence, v[:sha256.Size], v[sha256.Size:], true
}

// decodeAudit decodes a row. Of one that can't be read it tells the number, and
// that.
func decodeAudit(k, v []byte) AuditEntry {
	sequence, hash, entry, ok := parseAudit(k, v)
	var e AuditEntry
	if !ok || decodeRecord(entry, &e) != nil || !e.valid(nil) {
		e = AuditEntry{Method: AuditDamageMethod, Code: AuditDamageCode, Reason: AuditDamageReason}
	}
	e.Sequence, e.Hash = sequence, [sha256.Size]byte(hash)
	return e
}

func (e *AuditEntry) valid([]byte) bool { return e.Method != "" && e.Code != "" }

// appendAudit writes entries, and removes as many old ones as there have to be.
func (t *txn) appendAudit(entries []AuditEntry) error {
	st, genuine, damage := t.auditState()
	if damage != "" {
		if err := t.repairAudit(st, genuine); err != nil {
			return err
		}
		t.store.cfg.Logger.Error("the audit log is damaged, it goes on after that", "damage", damage, "entry", st.Next)
		entries = slices.Insert(slices.Clone(entries), 0, AuditEntry{
			Time: t.now, Method: AuditDamageMethod, Code: AuditDamageCode, Reason: AuditDamageReason,
		})
	}
	b := t.Bucket(bucketAudit)
	b.FillPercent = 1 // rows come in order: no page gets another one later
	before, err := hex.DecodeString(st.Head)
	if err != nil {
		return err
	}
	for i := range entries {
		e := &entries[i]
		if e.Time.IsZero() {
			e.Time = t.now
		}
		if t.scratch, err = appendRecord(t.scratch[:0], e); err != nil {
			return err
		}
		hash := auditHash(before, st.Next, t.scratch)
		row := slices.Concat(hash[:], t.scratch)
		if err := t.renew(bucketAudit, number(st.Next), row); err != nil {
			return err
		}
		if st.First == st.Next {
			st.Oldest = e.Time
		}
		st.Bytes += int64(len(row))
		st.Next++
		before = hash[:]
	}
	st.Head = hex.EncodeToString(before)
	if maxBytes := t.store.cfg.Audit.MaxBytes; st.Bytes > maxBytes {
		keep := maxBytes - min(auditSlack, maxBytes/4)
		if _, err := t.pruneAudit(st, func(*auditState) bool { return st.Bytes > keep }); err != nil {
			return err
		}
	}
	return t.putAuditState(st)
}

func (t *txn) putAuditState(st *auditState) error {
	st.Copied = t.store.audit.copied.Load()
	st.MAC = st.mac(t.store.audit.key, t.store.instance)
	return t.putRecord(bucketCounters, counterAudit, st)
}

// pruneAudit removes the oldest rows, for as long as there is one that is to go,
// but auditChunk at most. What is left begins behind the hash of the last one that
// went.
func (t *txn) pruneAudit(st *auditState, goes func(*auditState) bool) (removed int, err error) {
	type old struct {
		key    []byte
		anchor []byte
		bytes  int
	}
	var rows []old
	c := t.Bucket(bucketAudit).Cursor()
	k, v := c.First()
	for len(rows) < auditChunk && k != nil && st.First < st.Next && goes(st) {
		_, hash, _, _ := parseAudit(k, v)
		rows = append(rows, old{slices.Clone(k), slices.Clone(hash), len(v)})
		st.Bytes = max(0, st.Bytes-int64(len(v)))
		k, v = c.Next()
		st.First, st.Oldest = st.Next, time.Time{}
		if k != nil {
			next := decodeAudit(k, v)
			st.First, st.Oldest = next.Sequence, next.Time
		}
	}
	if len(rows) == 0 {
		return 0, nil
	}
	st.Anchor = hex.EncodeToString(rows[len(rows)-1].anchor)
	for _, row := range rows {
		if err := t.delete(bucketAudit, row.key); err != nil {
			return 0, err
		}
	}
	return len(rows), nil
}

// auditState returns the record in counters, and whether it is genuine. Damage says in
// a sentence that it is not, or does not fit the newest row; empty: all is well.
func (t *txn) auditState() (st *auditState, genuine bool, damage string) {
	st = &auditState{}
	found, err := getRecord(t.Tx, bucketCounters, counterAudit, st)
	if !found || err != nil || !st.genuine(t.store.audit.key, t.store.instance) {
		return newAuditState(), false, "the record of where it begins and ends is not genuine"
	}
	k, v := t.Bucket(bucketAudit).Cursor().Last()
	last, hash, _, ok := parseAudit(k, v)
	switch {
	case k == nil && st.First != st.Next:
		damage = "all entries are missing"
	case k != nil && (!ok || last != st.Next-1 || hex.EncodeToString(hash) != st.Head):
		damage = "the newest entry is not the one that was written last"
	}
	return st, true, damage
}

// repairAudit makes the record fit the rows that are there, so that the log can go
// on. Rows at places that the log has not come to go: others need the room. Of the
// rest everything stays as it was found.
func (t *txn) repairAudit(st *auditState, genuine bool) error {
	end := uint64(1) << 62 // no log ever comes there
	if genuine {
		end = st.Next
	}
	var wrong [][]byte
	first, last, bytes := uint64(0), uint64(0), int64(0)
	c := t.Bucket(bucketAudit).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		sequence, hash, _, _ := parseAudit(k, v)
		if sequence == 0 || sequence >= end {
			wrong = append(wrong, slices.Clone(k))
			continue
		}
		if first == 0 {
			first = sequence
			if !genuine || first != st.First {
				st.Anchor, st.Oldest = "", decodeAudit(k, v).Time
			}
		}
		last, bytes, st.Head = sequence, bytes+int64(len(v)), hex.EncodeToString(hash)
	}
	st.Next, st.Bytes = max(st.Next, last+1), bytes
	if st.First = first; first == 0 {
		st.First, st.Anchor, st.Oldest = st.Next, "", time.Time{}
	}
	for _, k := range wrong {
		if err := t.delete(bucketAudit, k); err != nil {
			return err
		}
	}
	return nil
}

// Audit writes an entry and returns once it is durable. It is for what must not
// happen without one and has no change of the store's to be written with. Errors:
// ErrDiskFull, ErrReadOnly, ErrInDoubt.
func (s *Store) Audit(ctx context.Context, e AuditEntry) error {
	_, err := change(ctx, s, false, func(t *txn) (struct{}, error) {
		t.entries = append(t.entries, e)
		t.dirty = true
		return struct{}{}, nil
	})
	return err
}

// FlushAudit writes what AuditLater was given, and returns once it is durable.
func (s *Store) FlushAudit(ctx context.Context) error {
	_, err := change(ctx, s, false, func(t *txn) (struct{}, error) {
		t.flush = true
		return struct{}{}, nil
	})
	return err
}

// PruneAudit removes what is older than Config.Audit allows.
func (s *Store) PruneAudit(ctx context.Context) error {
	if s.cfg.Audit.MaxAge == 0 {
		return nil
	}
	for {
		removed, err := change(ctx, s, false, func(t *txn) (int, error) {
			cutoff := t.now.Add(-s.cfg.Audit.MaxAge)
			st, _, damage := t.auditState()
			if damage != "" || st.First == st.Next || !st.Oldest.Before(cutoff) {
				return 0, nil // damage the next entry tells of
			}
			removed, err := t.pruneAudit(st, func(st *auditState) bool { return st.Oldest.Before(cutoff) })
			if err != nil {
				return 0, err
			}
			return removed, t.putAuditState(st)
		})
		if err != nil || removed < auditChunk {
			return err
		}
	}
}

// AuditEntries returns the entries behind the given one, by their numbers upwards,
// or downwards, from the newest on if after is 0; those that match (nil: all), at
// most limit. The next part begins behind last, if there is more: a call looks at
// some thousands of entries and then leaves the rest to the next one, so that it
// may find none and yet not be at the end. One that can't be read comes as one of
// AuditDamageMethod.
func (s *Store) AuditEntries(after uint64, down bool, limit int, match func(*AuditEntry) bool) (entries []AuditEntry, last uint64, more bool, err error) {
	const chunks = 20
	last = after
	for range chunks {
		var chunk []AuditEntry
		err := s.view(func(tx *bolt.Tx) error {
			chunk = nil
			c := tx.Bucket(bucketAudit).Cursor()
			next := c.Next
			k, v := c.Seek(number(last + 1))
			if down {
				next = c.Prev
				if k, v = c.Last(); last != 0 {
					c.Seek(number(last))
					k, v = c.Prev()
				}
			}
			for ; k != nil && len(chunk) < auditChunk; k, v = next() {
				chunk = append(chunk, decodeAudit(k, v))
			}
			return nil
		})
		if err != nil {
			return nil, 0, false, err
		}
		for i := range chunk {
			if len(entries) == limit {
				return entries, last, true, nil
			}
			last = chunk[i].Sequence
			if match == nil || match(&chunk[i]) {
				entries = append(entries, chunk[i])
			}
		}
		if len(chunk) < auditChunk {
			return entries, last, false, nil
		}
	}
	return entries, last, true, nil
}

// AuditReport is what VerifyAudit has found.
type AuditReport struct {
	// First and Last are the numbers of the oldest and the newest entry; Last is
	// First-1 when there is none.
	First, Last uint64
	// Head is the newest entry's hash: who has written it down elsewhere knows later
	// whether what was there then is still there.
	Head [sha256.Size]byte
	// Bytes is how much the entries take.
	Bytes int64
	// Problem says in a sentence what is wrong first, and Problems how much is;
	// empty: the log is what was written, from its first entry on.
	Problem  string
	Problems int
}

func (r *AuditReport) problem(format string, args ...any) {
	if r.Problem == "" {
		r.Problem = fmt.Sprintf(format, args...)
	}
	r.Problems++
}

// VerifyAudit checks every entry of the log, and that none is missing. It reads in
// several transactions, while others write.
func (s *Store) VerifyAudit(ctx context.Context) (AuditReport, error) {
	v := auditVerifier{store: s}
	for !v.done {
		if err := ctx.Err(); err != nil {
			return AuditReport{}, err
		}
		if err := s.view(v.step); err != nil {
			return AuditReport{}, err
		}
	}
	return v.report, nil
}

// auditVerifier walks along the log.
type auditVerifier struct {
	store  *Store
	report AuditReport
	next   uint64 // the entry that has to follow; 0: it has not begun
	before []byte // the hash before it; nil: not known
	done   bool
}

// step checks the next rows.
func (v *auditVerifier) step(tx *bolt.Tx) error {
	st := &auditState{}
	found, err := getRecord(tx, bucketCounters, counterAudit, st)
	if !found || err != nil || !st.genuine(v.store.audit.key, v.store.instance) {
		v.report.problem("the record of where the log begins and ends is not genuine")
		v.done = true
		return nil
	}
	if st.First > v.next { // it begins, or was pruned meanwhile
		v.next, v.before = st.First, nil
		if anchor, err := hex.DecodeString(st.Anchor); err == nil && len(anchor) == sha256.Size {
			v.before = anchor
		}
	}
	v.report.First, v.report.Last, v.report.Bytes = st.First, st.Next-1, st.Bytes
	head, _ := hex.DecodeString(st.Head)
	copy(v.report.Head[:], head)

	c := tx.Bucket(bucketAudit).Cursor()
	k, row := c.First()
	if first, _, _, _ := parseAudit(k, row); k != nil && first < st.First {
		v.report.problem("there are entries before the first one, %d", st.First)
	}
	n := 0
	for k, row = c.Seek(number(v.next)); k != nil; k, row = c.Next() {
		if n++; n > auditChunk {
			return nil
		}
		v.check(k, row)
	}
	v.done = true
	switch {
	case v.next < st.Next:
		v.report.problem("the newest entries are missing, from %d to %d", v.next, st.Next-1)
	case v.next > st.Next:
		v.report.problem("there are entries after the last one, %d", st.Next-1)
	case hex.EncodeToString(v.before) != st.Head && st.First != st.Next:
		v.report.problem("entry %d is not the one that was written last", st.Next-1)
	}
	return nil
}

// check checks that a row follows the one before it.
func (v *auditVerifier) check(k, row []byte) {
	sequence, hash, entry, ok := parseAudit(k, row)
	if !ok {
		v.report.problem("entry %d can't be read", sequence)
	} else {
		if sequence != v.next {
			v.report.problem("entries are missing, from %d to %d", v.next, sequence-1)
		}
		want := auditHash(v.before, sequence, entry)
		if v.before != nil && !hmac.Equal(want[:], hash) && sequence == v.next {
			v.report.problem("entry %d was changed, or is not the one that was written after entry %d", sequence, sequence-1)
		}
		if e := decodeAudit(k, row); e.Method == AuditDamageMethod {
			v.report.problem("damage of earlier entries was found when entry %d was written, on %s", sequence, e.Time.Format(time.RFC3339))
		}
	}
	v.next, v.before = sequence+1, slices.Clone(hash)
}

// AuditCopied returns up to which entry the log was copied elsewhere. It is
// remembered with the next entry that is written: after a crash some may be copied
// again.
func (s *Store) AuditCopied() uint64 { return s.audit.copied.Load() }

// SetAuditCopied says that the log was copied up to an entry.
func (s *Store) SetAuditCopied(sequence uint64) { s.audit.copied.Store(sequence) }

// AuditWritten returns a channel that has a token once entries were written since
// the last one was taken. It is for one reader.
func (s *Store) AuditWritten() <-chan struct{} { return s.audit.written }
