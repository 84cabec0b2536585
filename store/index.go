package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sort"

	bolt "go.etcd.io/bbolt"

	"github.com/workspaced/workspaced/store/seal"
)

// A sealed value says which row of secrets it belongs to. That both of them are
// the newest ones only a third place can tell, which changes with every secret of
// the owner: the owner's row in indexes. It has a hash of each of its rows in
// secrets, and a seal over these and over the owner's sums. Who puts back both
// rows of a secret, or makes up one, is noticed when the secret is opened; who
// puts back all that an owner has, or the whole file, is not.

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

// sealBytes is the length of the seal before the entries: there is nothing in it.
const sealBytes = seal.Overhead

func indexAssociated(owner, sums []byte, x index) []byte {
	return seal.AssociatedData("workspaced index", string(owner), string(sums), string(x))
}

// openIndex returns an owner's index; a *RowError when it is not the one that
// belongs to the owner's sums.
func openIndex(tx *bolt.Tx, sealer *seal.Sealer, owner string) (index, error) {
	name := []byte(owner)
	sums, row := tx.Bucket(bucketOwners).Get(name), tx.Bucket(bucketIndexes).Get(name)
	if sums == nil && row == nil {
		return nil, nil
	}
	damaged := &RowError{string(bucketOwners), owner}
	if sums == nil || len(row) < sealBytes || (len(row)-sealBytes)%entryBytes != 0 {
		return nil, damaged
	}
	x := index(row[sealBytes:])
	if _, err := sealer.Open(row[:sealBytes], indexAssociated(name, sums, x)); err != nil {
		return nil, damaged
	}
	return slices.Clone(x), nil
}

// sealIndex returns an owner's row in indexes.
func sealIndex(sealer *seal.Sealer, owner, sums []byte, x index) ([]byte, error) {
	row, err := sealer.Seal(nil, indexAssociated(owner, sums, x))
	return append(row, x...), err
}

// putOwner writes an owner's sums and index.
func (t *txn) putOwner(o owner, sums *ownerRecord, x index) error {
	b, err := encodeRecord(sums)
	if err != nil {
		return err
	}
	name := []byte(o.name())
	row, err := sealIndex(t.store.sealer, name, b, x)
	if err != nil {
		return err
	}
	if err := t.put(bucketOwners, name, b); err != nil {
		return err
	}
	return t.put(bucketIndexes, name, row)
}

// putSecret writes a row in secrets, or with nil removes it, and keeps the index.
func (t *txn) putSecret(o owner, key string, r *secretRecord, x *index) error {
	row := o.row(key)
	if r == nil {
		x.delete(row)
		return t.delete(bucketSecrets, row)
	}
	b, err := encodeRecord(r)
	if err != nil {
		return err
	}
	x.put(row, b)
	return t.put(bucketSecrets, row, b)
}

// makeIndexes makes the indexes of a database that has none.
func makeIndexes(tx *bolt.Tx, sealer *seal.Sealer) error {
	indexes, err := tx.CreateBucket(bucketIndexes)
	if err != nil {
		return err
	}
	rows := map[string]index{}
	err = tx.Bucket(bucketSecrets).ForEach(func(k, v []byte) error {
		name, _, ok := bytes.Cut(k, []byte("/"))
		if !ok {
			return &RowError{string(bucketSecrets), string(k)}
		}
		x := rows[string(name)]
		x.put(k, v)
		rows[string(name)] = x
		return nil
	})
	if err != nil {
		return err
	}
	return tx.Bucket(bucketOwners).ForEach(func(name, sums []byte) error {
		row, err := sealIndex(sealer, name, sums, rows[string(name)])
		if err != nil {
			return err
		}
		return indexes.Put(name, row)
	})
}
