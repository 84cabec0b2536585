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

// endsAt reports whether the request is the one that the key of
// requests_by_expiry means.
func (r *requestRecord) endsAt(id string, key []byte) bool {
	return string(expiryKey(id, r.Expiry)) == string(key)
}

func requestAssociated(id string) []byte {
	return seal.AssociatedData("workspaced request", id)
}

// expiryKey sorts requests by their end.
func expiryKey(id string, expiry time.Time) []byte { return append(number(nanos(expiry)), id...) }

func parseExpiryKey(k []byte) (expiry time.Time, id string, err error) {
	if len(k) <= 8 {
		return time.Time{}, "", &RowError{string(bucketRequestsByExpiry), string(k)}
	}
	n, err := parseNumber(bucketRequestsByExpiry, k, k[:8])
	return time.Unix(0, int64(n)).UTC(), string(k[8:]), err
}

// nanos is a time as it is stored.
func nanos(t time.Time) uint64 { return uint64(max(0, t.UnixNano())) }

// replay finds the result of a request that was done before.
func (t *txn) replay(id string, fingerprint [sha256.Size]byte) (result Result, found bool, err error) {
	var row requestRecord
	found, err = getRecord(t.Tx, bucketRequests, []byte(id), &row)
	if err != nil || !found || !t.now.Before(row.Expiry) {
		return Result{}, false, err
	}
	plain, err := t.store.sealer.Open(row.Fingerprint, requestAssociated(id))
	if err != nil || subtle.ConstantTimeCompare(plain, fingerprint[:]) != 1 {
		return Result{}, false, ErrRequestReused
	}
	return row.Result, true, nil
}

// remember stores a request's result.
func (t *txn) remember(id string, fingerprint [sha256.Size]byte, result Result) error {
	sealed, err := t.store.sealer.Seal(fingerprint[:], requestAssociated(id))
	if err != nil {
		return err
	}
	row := requestRecord{Expiry: t.now.Add(requestAge), Fingerprint: sealed, Result: result}
	b, err := json.Marshal(row)
	if err != nil {
		return err
	}
	var sums requestSums
	if _, err := getRecord(t.Tx, bucketCounters, counterRequests, &sums); err != nil {
		return err
	}
	var expired requestRecord
	if found, err := getRecord(t.Tx, bucketRequests, []byte(id), &expired); err != nil {
		return err
	} else if found {
		if err := t.forget(expiryKey(id, expired.Expiry), &sums); err != nil {
			return err
		}
	}
	for sums.Count >= maxRequests || (sums.Count > 0 && sums.Bytes+int64(len(b)) > maxRequestBytes) {
		k, _ := t.Bucket(bucketRequestsByExpiry).Cursor().First()
		if k == nil {
			break
		}
		if err := t.forget(slices.Clone(k), &sums); err != nil {
			return err
		}
	}
	return t.putRequest(id, row.Expiry, b, &sums)
}

// putRequest stores a request, and the sums with it.
func (t *txn) putRequest(id string, expiry time.Time, b []byte, sums *requestSums) error {
	if err := t.put(bucketRequests, []byte(id), b); err != nil {
		return err
	}
	if err := t.put(bucketRequestsByExpiry, expiryKey(id, expiry), nil); err != nil {
		return err
	}
	sums.Count++
	sums.Bytes += int64(len(b))
	return t.putRecord(bucketCounters, counterRequests, sums)
}

// forget removes the request that a key of requests_by_expiry names. Damaged
// rows go as well: they must not stay in the way of every commit.
func (t *txn) forget(key []byte, sums *requestSums) error {
	if err := t.delete(bucketRequestsByExpiry, key); err != nil {
		return err
	}
	_, id, err := parseExpiryKey(key)
	if err != nil {
		return nil //nolint:nilerror // it names none
	}
	b := t.Bucket(bucketRequests).Get([]byte(id))
	var row requestRecord
	if b == nil || decode(bucketRequests, []byte(id), b, &row) == nil && !row.endsAt(id, key) {
		return nil
	}
	sums.Count--
	sums.Bytes -= int64(len(b))
	return t.delete(bucketRequests, []byte(id))
}

// endAt gives the request that a key of requests_by_expiry names another end.
func (t *txn) endAt(expiry time.Time, key []byte, sums *requestSums) error {
	_, id, err := parseExpiryKey(key)
	if err != nil {
		return err
	}
	var row requestRecord
	found, err := getRecord(t.Tx, bucketRequests, []byte(id), &row)
	if err := t.forget(key, sums); err != nil {
		return err
	}
	if err != nil || !found || !row.endsAt(id, key) {
		return nil //nolint:nilerror // there is nothing to be kept
	}
	row.Expiry = expiry
	b, err := json.Marshal(row)
	if err != nil {
		return err
	}
	return t.putRequest(id, expiry, b, sums)
}

// purgeRequests forgets some expired requests. Those that end too late, because
// the clock was set back since, get the end that they would get now.
func (t *txn) purgeRequests() error {
	latest := t.now.Add(requestAge)
	c := t.Bucket(bucketRequestsByExpiry).Cursor()
	var expired, late [][]byte
	for k, _ := c.First(); k != nil && len(expired) < purgeRequestsMax; k, _ = c.Next() {
		if expiry, _, err := parseExpiryKey(k); err == nil && expiry.After(t.now) {
			break
		}
		expired = append(expired, slices.Clone(k))
	}
	for k, _ := c.Last(); k != nil && len(late) < purgeRequestsMax; k, _ = c.Prev() {
		if expiry, _, err := parseExpiryKey(k); err != nil || !expiry.After(latest) {
			break
		}
		late = append(late, slices.Clone(k))
	}
	if len(expired)+len(late) == 0 {
		return nil
	}
	var sums requestSums
	if _, err := getRecord(t.Tx, bucketCounters, counterRequests, &sums); err != nil {
		return err
	}
	for _, key := range late {
		if err := t.endAt(latest, key, &sums); err != nil {
			return err
		}
	}
	for _, key := range expired {
		if err := t.forget(key, &sums); err != nil {
			return err
		}
	}
	return t.putRecord(bucketCounters, counterRequests, &sums)
}
