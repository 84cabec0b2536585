package store

import (
	"encoding/binary"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// RowError names a row that can't be read. It says nothing of what is in it.
type RowError struct{ Bucket, Key string }

func (e *RowError) Error() string {
	return fmt.Sprintf("row %.64q in %s can't be read", e.Key, e.Bucket)
}

// Is reports that the error is an ErrDamaged.
func (e *RowError) Is(target error) bool { return target == ErrDamaged }

// damagedRows says what is wrong with rows that can be read, each.
type damagedRows string

func (e damagedRows) Error() string { return string(e) }

// Is reports that the error is an ErrDamaged.
func (e damagedRows) Is(target error) bool { return target == ErrDamaged }

// record is what a row is decoded into. valid reports whether it makes sense
// under the row's key: JSON that is of something else, like null, decodes as well.
type record interface{ valid(key []byte) bool }

func (w *Workspace) valid(key []byte) bool {
	return w.ID == string(key) && w.UID != "" && w.Generation > 0 && w.Revision > 0 && w.Live >= 0 && w.Live < w.Generation
}

func (r *feedRow) valid([]byte) bool { return r.ID != "" }

func (r *secretRecord) valid([]byte) bool {
	newer := r.Version
	for i := range r.Older {
		if !r.Older[i].valid(newer) {
			return false
		}
		newer = r.Older[i].Version
	}
	return r.Version > 0 && r.Size >= 0 && r.Delivery.stored()
}

func (r *requestRecord) valid([]byte) bool { return !r.Expiry.IsZero() && len(r.Fingerprint) > 0 }

func (k *storedWrapped) valid([]byte) bool { return len(k.Keys) > 0 }

func (s *requestSums) valid([]byte) bool { return s.Count >= 0 && s.Bytes >= 0 }

// getRecord decodes a row into v and reports whether it is there. Decoding
// copies, so v outlives the transaction.
func getRecord(tx *bolt.Tx, bucket, key []byte, v record) (bool, error) {
	b := tx.Bucket(bucket).Get(key)
	if b == nil {
		return false, nil
	}
	return true, decode(bucket, key, b, v)
}

// decode returns a *RowError when the row can't be decoded.
func decode(bucket, key, value []byte, v record) error {
	if decodeRecord(value, v) != nil || !v.valid(key) {
		return &RowError{string(bucket), string(key)}
	}
	return nil
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// parseNumber parses what number made: part of a row, or all of it.
func parseNumber(bucket, key, b []byte) (uint64, error) {
	if len(b) != 8 {
		return 0, &RowError{string(bucket), string(key)}
	}
	return binary.BigEndian.Uint64(b), nil
}

// schemaOf returns the version of the database's schema; 0 when it has none.
func schemaOf(tx *bolt.Tx) (uint64, error) { return getNumber(tx, bucketMeta, metaSchema) }

// counter returns a number in counters; 0 when it is not there.
func counter(tx *bolt.Tx, key []byte) (uint64, error) { return getNumber(tx, bucketCounters, key) }

func getNumber(tx *bolt.Tx, bucket, key []byte) (uint64, error) {
	b := tx.Bucket(bucket).Get(key)
	if b == nil {
		return 0, nil
	}
	return parseNumber(bucket, key, b)
}
