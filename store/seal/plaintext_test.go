package seal_test

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/workspaced/workspaced/store/seal"
)

const canary = "c4n4ry-0f-g0ld"

// leaks reports whether out shows the canary in any usual form.
func leaks(out string) bool {
	decimal := strings.Trim(fmt.Sprint([]byte(canary)), "[]")
	for _, form := range []string{
		canary,
		hex.EncodeToString([]byte(canary)),
		fmt.Sprintf("% x", canary),
		strings.TrimPrefix(fmt.Sprintf("%#v", []byte(canary)), "[]byte"),
		decimal,
		base64.StdEncoding.EncodeToString([]byte(canary)),
	} {
		if strings.Contains(strings.ToLower(out), strings.ToLower(form)) {
			return true
		}
	}
	return false
}

func TestPlaintext_Confidential(t *testing.T) {
	p := seal.New([]byte(canary))
	type exported struct {
		Key   string
		Value seal.Plaintext
	}
	type unexported struct {
		key   string
		value seal.Plaintext
		ptr   *seal.Plaintext
		list  []seal.Plaintext
	}
	things := map[string]any{
		"value":      p,
		"pointer":    &p,
		"exported":   exported{"K", p},
		"unexported": unexported{"K", p, &p, []seal.Plaintext{p}},
		"slice":      []seal.Plaintext{p},
		"map":        map[string]seal.Plaintext{"K": p},
		"any":        []any{p, &p},
		"error":      fmt.Errorf("wrapped %v %+v", p, exported{"K", p}),
	}
	for name, thing := range things {
		t.Run(name, func(t *testing.T) {
			for _, verb := range []string{
				"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%#x", "%d", "%o", "%b", "%c", "%U",
				"%e", "%g", "%t", "%T", "%p", "%w", "%z", "%10.3s", "%-20v", "%[1]*d", "%08b", "%+q",
			} {
				if out := fmt.Sprintf(verb, thing); leaks(out) {
					t.Errorf("%s printed %s", verb, out)
				}
			}
			if out := fmt.Sprintln(thing); leaks(out) {
				t.Errorf("Sprintln printed %s", out)
			}
			if b, err := json.Marshal(thing); err == nil && leaks(string(b)) {
				t.Errorf("JSON is %s", b)
			}
			if b, err := xml.Marshal(thing); err == nil && leaks(string(b)) {
				t.Errorf("XML is %s", b)
			}
			var out bytes.Buffer
			slog.New(slog.NewTextHandler(&out, nil)).Info("m", "attr", thing, slog.Group("g", "attr", thing))
			slog.New(slog.NewJSONHandler(&out, nil)).Info("m", "attr", thing, slog.Group("g", "attr", thing))
			slog.New(slog.NewTextHandler(&out, nil)).Info(fmt.Sprint(thing))
			if leaks(out.String()) {
				t.Errorf("slog wrote %s", out.String())
			}
			var b bytes.Buffer
			if err := gob.NewEncoder(&b).Encode(thing); err == nil && leaks(b.String()) {
				t.Errorf("gob is %q", b.String())
			}
		})
	}
}

// A test of the test: an unprotected value is seen to leak.
func TestPlaintext_LeaksAreSeen(t *testing.T) {
	raw := struct{ value []byte }{[]byte(canary)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%x", "%s"} {
		if !leaks(fmt.Sprintf(verb, raw)) {
			t.Errorf("%s of an unprotected value is not seen", verb)
		}
	}
}

func TestPlaintext_PrintsRedacted(t *testing.T) {
	p := seal.New([]byte(canary))
	for _, out := range []string{
		p.String(), p.GoString(), fmt.Sprintf("%v", p), fmt.Sprintf("%#v", p), fmt.Sprintf("%x", p),
		fmt.Sprintf("%d", p), fmt.Sprintf("%q", p), p.LogValue().String(),
	} {
		if out != seal.Redacted {
			t.Errorf("printed %q", out)
		}
	}
	if b, err := json.Marshal(p); err != nil || string(b) != `"`+seal.Redacted+`"` {
		t.Errorf("JSON is %s, %v", b, err)
	}
	if b, err := p.MarshalText(); err != nil || string(b) != seal.Redacted {
		t.Errorf("text is %s, %v", b, err)
	}
}

// What is meant to be read back must fail instead of losing the value.
func TestPlaintext_NotEncodable(t *testing.T) {
	p := seal.New([]byte(canary))
	if err := gob.NewEncoder(&bytes.Buffer{}).Encode(p); err == nil {
		t.Error("gob took it")
	}
	if _, err := p.MarshalBinary(); err == nil {
		t.Error("binary took it")
	}
	if err := json.Unmarshal([]byte(`"x"`), &p); err == nil || leaks(err.Error()) {
		t.Errorf("JSON made one, or leaked: %v", err)
	}
}

func TestPlaintext_Value(t *testing.T) {
	b := []byte(canary)
	p := seal.New(b)
	b[0] = 'X'
	if p.Reveal() != canary || string(p.Bytes()) != canary || p.Len() != len(canary) {
		t.Errorf("got %q, %q, %d", p.Reveal(), p.Bytes(), p.Len())
	}
	var zero seal.Plaintext
	for _, test := range []struct {
		name string
		a, b seal.Plaintext
		want bool
	}{
		{"same", p, seal.New([]byte(canary)), true},
		{"itself", p, p, true},
		{"other", p, seal.New([]byte("x")), false},
		{"prefix", p, seal.New([]byte(canary[:3])), false},
		{"zero and empty", zero, seal.New(nil), true},
		{"zero and other", zero, p, false},
	} {
		if got := test.a.Equal(test.b); got != test.want {
			t.Errorf("%s: Equal is %t", test.name, got)
		}
		if got := test.b.Equal(test.a); got != test.want {
			t.Errorf("%s, the other way round: Equal is %t", test.name, got)
		}
	}
	if diff := cmp.Diff(p, seal.New([]byte("x"))); diff == "" || leaks(diff) {
		t.Errorf("diff is %q", diff)
	}
}
