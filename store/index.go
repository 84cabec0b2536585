package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"slices"
	"sort"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// A sealed value says which row of secrets it belongs to. That both of them are
// the newest ones only a third place can tell, which changes with every secret of
// the owner: the owner's own row. It has a hash of each of the other ones in
// secrets, and a seal over these and over the owner's sums. Who puts back both
// rows of a secret, or makes up one, is noticed when the secret is opened; who
// puts back all that an owner has, or the whole file, is not.
//
// The own row may lie in one page with the others, which then agree also if the disk
// has lost what was written to that page last. Against that stand the values, in other
// pages (but for a database so small that all lies in the page of its root): a later one
// than its row's does not open, one without a row makes Snapshot fail.

// An entry of an index is a hash of the row's key, by which it is found, and one of
// all the row, long enough that nobody finds another row with the same.
const (
	keyHashBytes = 8
	rowHashBytes = 16
	entryBytes   = keyHashBytes + rowHashBytes
)

type entryOfRow [entryBytes]byte

func newEntry(key, value []byte) (e entryOfRow) {
	name := sha256.Sum256(key)
	b := binary.AppendUvarint(make([]byte, 0, 256), uint64(len(key)))
	b = append(append(b, key...), value...)
	sum := sha256.Sum256(b)
	copy(e[:], name[:keyHashBytes])
	copy(e[keyHashBytes:], sum[:rowHashBytes])
	return e
}

// index is what rows an owner has in secrets: their entries, in order.
type index []byte

func (x index) len() int { return len(x) / entryBytes }

func (x index) at(i int) []byte { return x[i*entryBytes : (i+1)*entryBytes] }

// find finds the entry of the row's key, or where it would be.
func (x index) find(e entryOfRow) (i int, found bool) {
	return sort.Find(x.len(), func(i int) int { return bytes.Compare(e[:keyHashBytes], x.at(i)[:keyHashBytes]) })
}

// has reports whether a row is as it was written last.
func (x index) has(key, value []byte) bool {
	e := newEntry(key, value)
	i, found := x.find(e)
	return found && bytes.Equal(x.at(i), e[:])
}

// knows reports whether there is to be a row with that key.
func (x index) knows(key []byte) bool {
	_, found := x.find(newEntry(key, nil))
	return found
}

func (x *index) put(key, value []byte) {
	e := newEntry(key, value)
	i, found := x.find(e)
	if found {
		copy(x.at(i), e[:])
		return
	}
	*x = slices.Insert(*x, i*entryBytes, e[:]...)
}

func (x *index) delete(key []byte) {
	if i, found := x.find(newEntry(key, nil)); found {
		*x = slices.Delete(*x, i*entryBytes, (i+1)*entryBytes)
	}
}

// An owner's own row is a seal, its sums, four numbers, and the index. There is
// nothing in the seal: it is over the rest.
const (
	sealBytes = seal.Overhead
	sumsBytes = 4 * 8
)

// ownRow returns whose own row it is.
func ownRow(key []byte) (name []byte, own bool) { return bytes.CutSuffix(key, []byte("/")) }

func damagedOwner(name string) error { return &RowError{string(bucketSecrets), name + "/"} }

// parseOwner takes an owner's own row apart. It does not look at the seal; the index
// is a part of the row.
func parseOwner(row []byte) (s sums, x index, err error) {
	if len(row) < sealBytes+sumsBytes || (len(row)-sealBytes-sumsBytes)%entryBytes != 0 {
		return s, nil, errors.New("it has another length")
	}
	n := func(i int) int64 { return int64(binary.BigEndian.Uint64(row[sealBytes+8*i:])) }
	s = sums{bytes: int(n(0)), keyBytes: int(n(1)), retired: int(n(2)), lastVersion: n(3)}
	if !s.valid() {
		return s, nil, errors.New("its sums are negative")
	}
	return s, row[sealBytes+sumsBytes:], nil
}

// openOwner returns an owner's sums and index; a *RowError when they are not those
// that were written together. Whether they are the newest ones it can't tell.
func openOwner(tx *bolt.Tx, sealer *seal.Sealer, owner string) (sums, index, error) {
	row := tx.Bucket(bucketSecrets).Get([]byte(owner + "/"))
	if row == nil {
		return sums{}, nil, nil
	}
	s, x, err := openOwnerRow(sealer, []byte(owner), row)
	return s, slices.Clone(x), err
}

func openOwnerRow(sealer *seal.Sealer, owner, row []byte) (s sums, x index, err error) {
	if s, x, err = parseOwner(row); err == nil {
		_, err = sealer.Open(row[:sealBytes], ownerAssociated(owner, row[sealBytes:]))
	}
	if err != nil {
		return sums{}, nil, damagedOwner(string(owner))
	}
	return s, x, nil
}

// sealOwner returns an owner's own row.
func sealOwner(sealer *seal.Sealer, owner []byte, s *sums, x index) ([]byte, error) {
	b := make([]byte, 0, sumsBytes+len(x))
	for _, n := range []int64{int64(s.bytes), int64(s.keyBytes), int64(s.retired), s.lastVersion} {
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	b = append(b, x...)
	row, err := sealer.Seal(nil, ownerAssociated(owner, b))
	return append(row, b...), err
}

func ownerAssociated(owner, row []byte) []byte {
	return seal.AssociatedData("workspaced owner", string(owner), string(row))
}

// putOwner writes an owner's own row.
func (t *txn) putOwner(o owner, s *sums, x index) error {
	row, err := sealOwner(t.store.sealer, []byte(o.name()), s, x)
	if err != nil {
		return err
	}
	return t.renew(bucketSecrets, o.row(""), row) // no seal is like another
}

// putSecret writes a row in secrets, or with nil removes it, and keeps the index.
func (t *txn) putSecret(o owner, key string, r *secretRecord, x *index) error {
	row := o.row(key)
	if r == nil {
		x.delete(row)
		return t.delete(bucketSecrets, row)
	}
	b, err := t.encode(r)
	if err != nil {
		return err
	}
	x.put(row, b)
	return t.renew(bucketSecrets, row, b)
}
