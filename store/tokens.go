package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Bounds of tokens.
const (
	// MaxTokensPerSubject is how many valid ones a subject has.
	MaxTokensPerSubject = 50
	// MaxTokens is how many there are in all, those that have ended included.
	MaxTokens = 10_000
	// tokenMemory is how long one that has ended is remembered, so that an operator
	// learns what it was; the oldest are forgotten earlier when there are too many.
	tokenMemory = 7 * 24 * time.Hour
)

// Token is a bearer token's record. The token itself is nowhere.
type Token struct {
	ID string `json:"id"`
	// Hash is the token's SHA-256, and Shown how it begins.
	Hash  []byte `json:"hash"`
	Shown string `json:"shown"`
	// Subject is for whom it was made.
	Subject string `json:"subject"`
	// Roles, and the workspaces for which they hold: see access.Scope.
	Roles      []string          `json:"roles"`
	Workspaces string            `json:"workspaces,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	// Creator is the subject that had it made.
	Creator    string    `json:"creator,omitempty"`
	CreateTime time.Time `json:"createTime"`
	ExpireTime time.Time `json:"expireTime"`
	// LastUseTime is written now and then; zero: it was not used.
	LastUseTime time.Time `json:"lastUseTime,omitzero"`
	// RevokeTime is zero while it was not revoked.
	RevokeTime time.Time `json:"revokeTime,omitzero"`
}

func (t *Token) valid(key []byte) bool {
	return t.ID == string(key) && len(t.Hash) == 32 && t.Shown != "" && t.Subject != "" && !t.ExpireTime.IsZero()
}

// ended returns when it ended: it was revoked or expired. ok is false as long as it
// has not.
func (t *Token) ended(now time.Time) (at time.Time, ok bool) {
	at = t.ExpireTime
	if !t.RevokeTime.IsZero() && t.RevokeTime.Before(at) {
		at = t.RevokeTime
	}
	return at, !t.RevokeTime.IsZero() || !now.Before(t.ExpireTime)
}

// Errors of tokens.
var (
	// ErrTokenNotFound: there is no such token.
	ErrTokenNotFound = errors.New("token not found")
	// ErrTooManyTokens comes as *TokenLimitError.
	ErrTooManyTokens = errors.New("too many tokens")
)

// TokenLimitError says which limit of tokens is reached.
type TokenLimitError struct {
	// Subject is who has as many as a subject can have; empty: there are too many in
	// all.
	Subject string
	Limit   int
}

func (e *TokenLimitError) Error() string {
	if e.Subject == "" {
		return fmt.Sprintf("there are %d tokens, the limit: revoke some", e.Limit)
	}
	return fmt.Sprintf("%q has %d valid tokens, the limit: revoke one", e.Subject, e.Limit)
}

// Is reports that the error is an ErrTooManyTokens.
func (e *TokenLimitError) Is(target error) bool { return target == ErrTooManyTokens }

// Tokens returns all tokens, by id.
func (s *Store) Tokens() (tokens []Token, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		tokens, err = tokensOf(tx)
		return err
	})
	if err != nil {
		return nil, err
	}
	return tokens, nil
}

func tokensOf(tx *bolt.Tx) (tokens []Token, err error) {
	err = tx.Bucket(bucketTokens).ForEach(func(k, v []byte) error {
		var t Token
		err := decode(bucketTokens, k, v, &t)
		tokens = append(tokens, t)
		return err
	})
	return tokens, err
}

// CreateToken stores a new token; its CreateTime is set here. Those that ended long
// ago are forgotten by this, and named. Of the options ValidateOnly and Audit count.
// Errors: *TokenLimitError, ErrDiskFull.
func (s *Store) CreateToken(ctx context.Context, t Token, opts Options) (made Token, forgotten []string, err error) {
	audit := changeAudit{opts: &opts}
	made, err = change(ctx, s, opts.ValidateOnly, func(x *txn) (Token, error) {
		forgotten = nil
		t := t
		t.CreateTime, t.ExpireTime = x.now, t.ExpireTime.UTC().Round(0)
		if !t.valid([]byte(t.ID)) || x.Bucket(bucketTokens).Get([]byte(t.ID)) != nil {
			return Token{}, fmt.Errorf("store: token %q is not complete, or there", t.ID)
		}
		all, err := tokensOf(x.Tx)
		if err != nil {
			return Token{}, err
		}
		mine := 0
		type end struct {
			id string
			at time.Time
		}
		var ends []end
		for i := range all {
			if at, ended := all[i].ended(x.now); ended {
				ends = append(ends, end{all[i].ID, at})
			} else if all[i].Subject == t.Subject {
				mine++
			}
		}
		slices.SortFunc(ends, func(a, b end) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.id, b.id)) })
		for _, e := range ends {
			if x.now.Sub(e.at) > tokenMemory || len(all)-len(forgotten) >= MaxTokens {
				forgotten = append(forgotten, e.id)
			}
		}
		switch {
		case mine >= MaxTokensPerSubject:
			return Token{}, &TokenLimitError{t.Subject, MaxTokensPerSubject}
		case len(all)-len(forgotten) >= MaxTokens:
			return Token{}, &TokenLimitError{Limit: MaxTokens}
		}
		for _, id := range forgotten {
			if err := x.delete(bucketTokens, []byte(id)); err != nil {
				return Token{}, err
			}
		}
		if err := x.putRecord(bucketTokens, []byte(t.ID), &t); err != nil {
			return Token{}, err
		}
		audit.note(x, 0, effectOf(true, &opts))
		return t, nil
	})
	if err != nil {
		return Token{}, nil, err
	}
	audit.done(s)
	return made, forgotten, nil
}

// RevokeToken ends a token. It reports whether it was not revoked before. Of the
// options Audit counts. Errors: ErrTokenNotFound, ErrDiskFull.
func (s *Store) RevokeToken(ctx context.Context, id string, opts Options) (t Token, changed bool, err error) {
	audit := changeAudit{opts: &opts}
	t, err = change(ctx, s, false, func(x *txn) (Token, error) {
		t, err := x.token(id)
		if err != nil {
			return t, err
		}
		if changed = t.RevokeTime.IsZero(); changed {
			t.RevokeTime = x.now
			if err := x.putRecord(bucketTokens, []byte(id), &t); err != nil {
				return t, err
			}
		}
		audit.note(x, 0, effectOf(changed, &opts))
		return t, nil
	})
	if err != nil {
		return Token{}, false, err
	}
	audit.done(s)
	return t, changed, nil
}

func (x *txn) token(id string) (t Token, err error) {
	if id == "" {
		return t, ErrTokenNotFound
	}
	found, err := getRecord(x.Tx, bucketTokens, []byte(id), &t)
	if err == nil && !found {
		err = ErrTokenNotFound
	}
	return t, err
}

// UseTokens writes when tokens, by id, were used last. Those that are gone by now
// are passed over.
func (s *Store) UseTokens(ctx context.Context, used map[string]time.Time) error {
	_, err := change(ctx, s, false, func(x *txn) (struct{}, error) {
		for id, at := range used {
			t, err := x.token(id)
			switch {
			case errors.Is(err, ErrTokenNotFound):
				continue
			case err != nil:
				return struct{}{}, err
			case !at.After(t.LastUseTime):
				continue
			}
			t.LastUseTime = at
			if err := x.putRecord(bucketTokens, []byte(id), &t); err != nil {
				return struct{}{}, err
			}
		}
		return struct{}{}, nil
	})
	return err
}
