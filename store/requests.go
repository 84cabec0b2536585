package store

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"slices"
	"time"

	"github.com/workspaced/workspaced/store/seal"
)

// Bounds of what is kept to answer repeated requests.
const (
	requestAge       = time.Hour
	maxRequests      = 100_000
	maxRequestBytes  = 256 << 20
	purgeRequestsMax = 32 // expired ones, a commit
)

// requestRecord remembers a request that was done.
type requestRecord struct {
	Expiry time.Time `json:"expiry"`
	// Fingerprint is the sealed SHA-256 of Options.Fingerprint, which may contain
	// secrets: sealed, nobody can try values against it.
	Fingerprint []byte `json:"fingerprint"`
	// Result holds metadata only.
	Result Result `json:"result"`
}

// requestSums is how much is kept.
type requestSums struct {
	Count int64 `json:"count"`
	Bytes int64 `json:"bytes"`
}

func requestAssociated(id string) []byte {
	return seal.AssociatedData("workspaced request", id)
}

// expiryKey sorts requests by their end.
func expiryKey(id string, expiry time.Time) []byte {
	return append(number(uint64(expiry.UnixNano())), id...)
}

// replay finds the result of a request that was done before.
func (t *txn) replay(id string, fingerprint [sha256.Size]byte) (result Result, found bool, err error) {
	var row requestRecord
	found, err = getRecord(t.Tx, bucketRequests, []byte(id), &row)
	if err != nil || !found || !t.now.Before(row.Expiry) {
		return Result{}, false, err
	}
	plain, err := t.store.cfg.Sealer.Open(row.Fingerprint, requestAssociated(id))
	if err != nil || subtle.ConstantTimeCompare(plain, fingerprint[:]) != 1 {
		return Result{}, false, ErrRequestReused
	}
	return row.Result, true, nil
}

// remember stores a request's result.
func (t *txn) remember(id string, fingerprint [sha256.Size]byte, result Result) error {
	sealed, err := t.store.cfg.Sealer.Seal(fingerprint[:], requestAssociated(id))
	if err != nil {
		return err
	}
	row := requestRecord{Expiry: t.now.Add(requestAge), Fingerprint: sealed, Result: result}
	b, err := json.Marshal(row)
	if err != nil {
		return err
	}
	var sums requestSums
	if _, err := getRecord(t.Tx, bucketMeta, metaRequests, &sums); err != nil {
		return err
	}
	if err := t.forget(id, &sums); err != nil { // an expired one
		return err
	}
	for sums.Count >= maxRequests || (sums.Count > 0 && sums.Bytes+int64(len(b)) > maxRequestBytes) {
		k, _ := t.Bucket(bucketRequestsByExpiry).Cursor().First()
		if k == nil {
			break
		}
		if err := t.forget(string(k[8:]), &sums); err != nil {
			return err
		}
	}
	if err := t.put(bucketRequests, []byte(id), b); err != nil {
		return err
	}
	if err := t.put(bucketRequestsByExpiry, expiryKey(id, row.Expiry), nil); err != nil {
		return err
	}
	sums.Count++
	sums.Bytes += int64(len(b))
	return t.putRecord(bucketMeta, metaRequests, sums)
}

// forget removes a request if it is there.
func (t *txn) forget(id string, sums *requestSums) error {
	b := t.Bucket(bucketRequests).Get([]byte(id))
	if b == nil {
		return nil
	}
	var row requestRecord
	if err := decode(bucketRequests, []byte(id), b, &row); err != nil {
		return err
	}
	sums.Count--
	sums.Bytes -= int64(len(b))
	if err := t.delete(bucketRequests, []byte(id)); err != nil {
		return err
	}
	return t.delete(bucketRequestsByExpiry, expiryKey(id, row.Expiry))
}

// purgeRequests forgets some expired requests.
func (t *txn) purgeRequests() error {
	var expired []string
	c := t.Bucket(bucketRequestsByExpiry).Cursor()
	for k, _ := c.First(); k != nil && len(expired) < purgeRequestsMax; k, _ = c.Next() {
		if parseNumber(k[:8]) > uint64(t.now.UnixNano()) {
			break
		}
		expired = append(expired, string(slices.Clone(k[8:])))
	}
	if len(expired) == 0 {
		return nil
	}
	var sums requestSums
	if _, err := getRecord(t.Tx, bucketMeta, metaRequests, &sums); err != nil {
		return err
	}
	for _, id := range expired {
		if err := t.forget(id, &sums); err != nil {
			return err
		}
	}
	return t.putRecord(bucketMeta, metaRequests, sums)
}
