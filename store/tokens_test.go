package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"
)

// token makes one that lasts for an hour unless it says otherwise.
func (h *harness) token(t Token) Token {
	h.t.Helper()
	made, err := h.tryToken(t)
	if err != nil {
		h.t.Fatal(err)
	}
	return made
}

func (h *harness) tryToken(t Token) (Token, error) {
	hash := sha256.Sum256([]byte(t.ID))
	t.Hash, t.Shown = hash[:], "wsd_"+t.ID
	if t.ExpireTime.IsZero() {
		t.ExpireTime = h.clock.Now().Add(time.Hour)
	}
	made, _, err := h.CreateToken(ctx, t, Options{})
	return made, err
}

func TestTokens_SurviveRestart(t *testing.T) {
	h := newHarness(t)
	h.token(Token{ID: "a", Subject: "ci", Roles: []string{"viewer"}, Labels: map[string]string{"team": "a"}, Creator: "me"})
	h.token(Token{ID: "b", Subject: "ci", Roles: []string{"admin"}})
	used := h.clock.Now()
	if err := h.UseTokens(ctx, map[string]time.Time{"a": used, "gone": used}); err != nil {
		t.Fatal(err)
	}
	if err := h.UseTokens(ctx, map[string]time.Time{"a": used.Add(-time.Minute)}); err != nil { // never back
		t.Fatal(err)
	}
	revoked, changed, err := h.RevokeToken(ctx, "b", Options{})
	if err != nil || !changed || revoked.RevokeTime.IsZero() {
		t.Errorf("got %+v, %v, %v", revoked, changed, err)
	}
	again, changed, err := h.RevokeToken(ctx, "b", Options{})
	if err != nil || changed || !again.RevokeTime.Equal(revoked.RevokeTime) {
		t.Errorf("again: got %+v, %v, %v", again, changed, err)
	}
	for _, id := range []string{"none", ""} {
		if _, _, err := h.RevokeToken(ctx, id, Options{}); !errors.Is(err, ErrTokenNotFound) {
			t.Errorf("%q: got %v", id, err)
		}
	}
	before := must(h.Tokens())(t)
	if len(before) != 2 || !before[0].LastUseTime.Equal(used) || before[0].Labels["team"] != "a" || before[0].Creator != "me" {
		t.Errorf("got %+v", before)
	}
	h.reopen()
	if diff := cmp.Diff(before, must(h.Tokens())(t)); diff != "" {
		t.Error(diff)
	}
}

// A subject has at most 50 valid ones; those that have ended don't count.
func TestTokens_LimitPerSubject(t *testing.T) {
	h := newHarness(t)
	for i := range MaxTokensPerSubject {
		h.token(Token{ID: fmt.Sprint("t", i), Subject: "ci"})
	}
	var limit *TokenLimitError
	if _, err := h.tryToken(Token{ID: "more", Subject: "ci"}); !errors.As(err, &limit) || limit.Subject != "ci" || limit.Limit != 50 {
		t.Errorf("got %v", err)
	}
	h.token(Token{ID: "other", Subject: "cd"})
	must2(h.RevokeToken(ctx, "t0", Options{}))(t)
	h.token(Token{ID: "instead", Subject: "ci"})
	if _, err := h.tryToken(Token{ID: "more", Subject: "ci"}); !errors.Is(err, ErrTooManyTokens) {
		t.Errorf("got %v", err)
	}
	h.clock.Add(2 * time.Hour) // all have expired
	h.token(Token{ID: "later", Subject: "ci"})
	_, _, err := h.CreateToken(ctx, Token{ID: "bad", Subject: "ci"}, Options{})
	if err == nil {
		t.Error("one without a hash was made")
	}
}

func must2[T any](v T, _ bool, err error) func(testT) T { return must(v, err) }

// What has ended is remembered for a week, and not longer.
func TestTokens_Forgotten(t *testing.T) {
	h := newHarness(t)
	h.token(Token{ID: "expires", Subject: "a"})
	h.token(Token{ID: "revoked", Subject: "a", ExpireTime: h.clock.Now().Add(1000 * time.Hour)})
	h.token(Token{ID: "lasts", Subject: "a", ExpireTime: h.clock.Now().Add(1000 * time.Hour)})
	must2(h.RevokeToken(ctx, "revoked", Options{}))(t)
	names := func() (ids []string) {
		for _, token := range must(h.Tokens())(t) {
			ids = append(ids, token.ID)
		}
		return ids
	}
	h.clock.Add(7*24*time.Hour - time.Minute)
	h.token(Token{ID: "new1", Subject: "a"})
	if diff := cmp.Diff([]string{"expires", "lasts", "new1", "revoked"}, names()); diff != "" {
		t.Error(diff)
	}
	h.clock.Add(2 * time.Hour)
	hash := sha256.Sum256(nil)
	next := Token{ID: "new2", Subject: "a", Hash: hash[:], Shown: "x", ExpireTime: h.clock.Now().Add(time.Hour)}
	if _, forgotten, err := h.CreateToken(ctx, next, Options{ValidateOnly: true}); err != nil || len(forgotten) != 2 || len(names()) != 4 {
		t.Errorf("rehearsed: forgotten %v, %v, there are %v", forgotten, err, names())
	}
	_, forgotten, err := h.CreateToken(ctx, next, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"revoked", "expires"}, forgotten); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"lasts", "new1", "new2"}, names()); diff != "" {
		t.Error(diff)
	}
}

// There are at most 10,000 in all: the oldest that have ended make room, valid ones
// do not.
func TestTokens_LimitInAll(t *testing.T) {
	h := newHarness(t)
	must(change(ctx, h.Store, false, func(x *txn) (struct{}, error) {
		for i := range MaxTokens {
			id := fmt.Sprintf("t%05d", i)
			hash := sha256.Sum256([]byte(id))
			token := Token{ID: id, Hash: hash[:], Shown: id, Subject: id, ExpireTime: x.now.Add(time.Hour)}
			if i == 77 {
				token.RevokeTime = x.now
			}
			if err := x.putRecord(bucketTokens, []byte(id), &token); err != nil {
				return struct{}{}, err
			}
		}
		return struct{}{}, nil
	}))(t)
	hash := sha256.Sum256(nil)
	next := Token{Subject: "a", Hash: hash[:], Shown: "x", ExpireTime: h.clock.Now().Add(time.Hour)}
	next.ID = "x1"
	if _, forgotten, err := h.CreateToken(ctx, next, Options{}); err != nil || len(forgotten) != 1 || forgotten[0] != "t00077" {
		t.Errorf("got %v, %v", forgotten, err)
	}
	next.ID = "x2"
	var limit *TokenLimitError
	if _, _, err := h.CreateToken(ctx, next, Options{}); !errors.As(err, &limit) || limit.Subject != "" || limit.Limit != MaxTokens {
		t.Errorf("got %v", err)
	}
}

// A row that can't be read is found at the start.
func TestTokens_Damaged(t *testing.T) {
	h := newHarness(t)
	h.token(Token{ID: "a", Subject: "ci"})
	h.close()
	db, err := bolt.Open(h.cfg.Path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketTokens)
		return b.Put([]byte("a"), bytes.Replace(b.Get([]byte("a")), []byte(`"hash":"`), []byte(`"hash":"AAAA`), 1))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	refused(t, h.cfg, ErrDamaged)
}

// An older database has none, and takes some.
func TestTokens_AfterMigration(t *testing.T) {
	for version := 1; version < schemaVersion; version++ {
		if _, err := os.Stat(fixture(version, "db")); err != nil {
			t.Fatal(err)
		}
		s := openFixture(t, version)
		if tokens := must(s.Tokens())(t); len(tokens) > 0 && version < 7 {
			t.Errorf("version %d has %v", version, tokens)
		}
		hash := sha256.Sum256(nil)
		if _, _, err := s.CreateToken(ctx, Token{ID: "a", Subject: "ci", Hash: hash[:], Shown: "x", ExpireTime: fixtureTime.Add(time.Hour)}, Options{}); err != nil {
			t.Errorf("version %d: %v", version, err)
		}
	}
}

// Who may make a change is asked in its transaction, about the workspace as it is
// then, and before anything else is said of it.
func TestOptionsAllow(t *testing.T) {
	h := newHarness(t)
	h.create("w", value("K", "v"))
	before := dump(t, h.db)
	errNo := errors.New("no")
	asked := 0
	opts := Options{Etag: "wrong", Allow: func(w *Workspace) error {
		asked++
		if w.ID != "w" {
			t.Errorf("asked about %q", w.ID)
		}
		return errNo
	}}
	for name, do := range map[string]func() error{
		"update": func() error {
			_, err := h.UpdateWorkspace(ctx, "w", func(*Editable) error { return nil }, opts)
			return err
		},
		"delete":  func() error { _, err := h.DeleteWorkspace(ctx, "w", false, opts); return err },
		"restart": func() error { _, err := h.RestartWorkspace(ctx, "w", opts); return err },
		"stop":    func() error { _, err := h.StopWorkspace(ctx, "w", opts); return err },
		"start":   func() error { _, err := h.StartWorkspace(ctx, "w", opts); return err },
		"secrets": func() error { _, err := h.UpdateSecrets(ctx, in("w"), set("K", "new"), opts); return err },
	} {
		asked = 0
		if err := do(); !errors.Is(err, errNo) || asked != 1 {
			t.Errorf("%s: got %v, asked %d times", name, err, asked)
		}
	}
	if diff := cmp.Diff(before, dump(t, h.db)); diff != "" {
		t.Error(diff)
	}
}
