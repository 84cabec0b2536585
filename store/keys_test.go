package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/store/seal"
)

// kek is a KEK that fails as told.
type kek struct {
	*seal.Local
	err   error
	calls int
}

func (k *kek) Name() string { return "kek:test" }

func (k *kek) EncryptWithContext(ctx context.Context, plain, associated []byte) ([]byte, error) {
	k.calls++
	if k.err != nil {
		return nil, k.err
	}
	return k.Local.EncryptWithContext(ctx, plain, associated)
}

func (k *kek) DecryptWithContext(ctx context.Context, wrapped, associated []byte) ([]byte, error) {
	k.calls++
	if k.err != nil {
		return nil, k.err
	}
	return k.Local.DecryptWithContext(ctx, wrapped, associated)
}

// Without its KEK a store that runs goes on, a rotation is refused and changes
// nothing, one that has begun comes to its end, and a start is refused.
func TestKEK_IsDown(t *testing.T) {
	h := filledWith(t, 3, 10)
	k := &kek{Local: h.cfg.KEK.(*seal.Local)}
	h.cfg.FormerKEK = h.cfg.KEK
	h.cfg.KEK = k
	steps := newManualUpkeep(h)
	if keys := h.keys(); keys.KEK != "kek:test" || keys.Rotating {
		t.Errorf("got %+v", keys)
	}
	h.cfg.FormerKEK = nil
	h.reopen()
	r := must(h.RotateKey(ctx, request("rotate", "f")))(t)

	k.err = errors.New("connection refused")
	before := dump(t, h.db)
	for _, o := range []Options{{}, request("another", "f"), {ValidateOnly: true}} {
		if _, err := h.RotateKey(ctx, o); !errors.Is(err, ErrKEK) {
			t.Errorf("got %v", err)
		}
	}
	if diff := cmp.Diff(before, dump(t, h.db)); diff != "" {
		t.Error(diff)
	}
	if again := must(h.RotateKey(ctx, request("rotate", "f")))(t); again.KeyID != r.KeyID {
		t.Errorf("got %+v", again)
	}
	k.calls = 0
	must(h.UpdateSecrets(ctx, in("w00"), set("K", "2"), Options{}))(t)
	if h.values("w00")["K"] != "2" {
		t.Error("it was not set")
	}
	for steps.step(h) {
	}
	checkKeys(t, h, r.KeyID)
	if k.calls != 0 {
		t.Errorf("the KEK was asked %d times", k.calls)
	}
	h.close()

	refused(t, h.cfg, ErrKEK)
	if _, err := Open(h.cfg); err == nil || !strings.Contains(err.Error(), "which kek:test does not give: connection refused") {
		t.Errorf("got %v", err)
	}
	cfg := h.cfg
	cfg.Path += ".new"
	if _, err := Open(cfg); !errors.Is(err, ErrKEK) || !strings.Contains(err.Error(), "can't be made without a key, which kek:test does not give: connection refused") {
		t.Errorf("a new one: got %v", err)
	}
	if entries := must(os.ReadDir(filepath.Dir(h.cfg.Path)))(t); len(entries) != 2 {
		t.Errorf("files: %v", entries)
	}
	k.err = nil
	h.open()
	if h.values("w00")["K"] != "2" {
		t.Error("it is lost")
	}
}

// Another KEK takes over from a former one, which is of no use from then on.
func TestKEK_IsReplaced(t *testing.T) {
	h := filledWith(t, 3, 10)
	truth, former := readAll(t, h), h.cfg.KEK
	h.close()
	h.cfg.KEK = must(seal.LoadOrCreate(filepath.Join(t.TempDir(), "new")))(t)
	refused(t, h.cfg, ErrWrongKey)
	h.cfg.FormerKEK = must(seal.LoadOrCreate(filepath.Join(t.TempDir(), "another")))(t)
	refused(t, h.cfg, ErrWrongKey)
	h.cfg.FormerKEK = former
	h.open()
	primary := h.keys().Primary
	h.close()
	for _, cfg := range []Config{h.cfg, {Path: h.cfg.Path, KEK: h.cfg.KEK}} { // it may stay, or not
		h.cfg = cfg
		h.open()
		if diff := diffTruth(truth, readAll(t, h)); diff != "" {
			t.Error(diff)
		}
		checkKeys(t, h, primary) // nothing had to be sealed anew
		h.close()
	}
	h.cfg.KEK = former
	refused(t, h.cfg, ErrWrongKey)
}

// What a key file has sealed directly, in a database of an earlier version, is
// sealed anew with a data key, and the key file's key only wraps from then on.
func TestKEK_CarriesOver(t *testing.T) {
	for version := 1; version < keysVersion; version++ {
		t.Run(fmt.Sprint(version), func(t *testing.T) {
			file := must(os.ReadFile(fixture(version, "db")))(t)
			s := openFixture(t, version)
			h := &harness{Store: s, t: t, cfg: s.cfg}
			h.keptUp()
			direct := must(seal.Direct(h.cfg.KEK.(*seal.Local)))(t)
			primary := h.keys().Primary
			if primary == direct.Primary() {
				t.Error("the KEK seals")
			}
			checkKeys(t, h, primary)
			for place, sealed := range sealedOnes(t, h.db) {
				if bytes.Contains(file, []byte(sealed)) {
					t.Errorf("%s is as it was", place)
				}
			}
			// Nothing of what the key file opens is left.
			prefix := append([]byte{1}, byte(direct.Primary()>>24), byte(direct.Primary()>>16), byte(direct.Primary()>>8), byte(direct.Primary()))
			now := must(os.ReadFile(h.cfg.Path))(t)
			if n := bytes.Count(file, prefix); n < 5 {
				t.Errorf("the fixture has %d", n)
			}
			if n := bytes.Count(now, prefix); n > 1+1 { // what it has wrapped: the keys
				t.Errorf("%d times something of the key file's", n)
			}
			h.reopen()
			checkKeys(t, h, primary)
			if len(slices.Collect(maps.Keys(h.keys().Records))) != 1 {
				t.Errorf("got %+v", h.keys())
			}
			h.close()
			cfg := h.cfg
			cfg.KEK = &kek{Local: h.cfg.KEK.(*seal.Local)}
			if version == 1 { // a KEK that never sealed directly can't have
				if err := os.WriteFile(cfg.Path, file, 0o600); err != nil {
					t.Fatal(err)
				}
				refused(t, cfg, ErrWrongKey)
			}
		})
	}
}
