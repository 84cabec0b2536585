package store

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// codedRecords makes one of each record that has a description.
var codedRecords = []func() coded{
	func() coded { return &Workspace{} }, func() coded { return &Status{} },
	func() coded { return &feedRow{} }, func() coded { return &secretRecord{} },
	func() coded { return &AuditEntry{} }, func() coded { return &auditState{} },
}

var (
	someTexts = []string{
		"a", "registry/image:tag@sha256:0", "with space", `"`, `\`, `\"`, "a\x00\n\t\x1f\x7f", "<a&b>", "ä€😀", "\u2028", "\xff\xc0", "}{][,:", `\u0041`,
	}
	someNumbers = []int64{1, -1, 42, 1e17, 999_999_999_999_999_999, math.MaxInt64, math.MinInt64}
	someMoments = []time.Time{
		time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), time.Date(2026, 1, 2, 3, 4, 5, 60_000, time.UTC),
		time.Date(9999, 12, 31, 23, 59, 59, 999_999_999, time.UTC), time.Date(0, 1, 1, 0, 0, 0, 1, time.UTC),
		time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 90*60)),
	}
)

// fillRandom sets everything in v, each with the probability p: what is new in a type is
// in the tests at once.
func fillRandom(r *rand.Rand, v reflect.Value, p float64) {
	if r.Float64() > p {
		return
	}
	if v.Type() == reflect.TypeFor[time.Time]() {
		v.Set(reflect.ValueOf(someMoments[r.IntN(len(someMoments))]))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() && v.Type().Field(i).Tag.Get("json") != "-" {
				fillRandom(r, v.Field(i), p)
			}
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fillRandom(r, v.Elem(), p)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), r.IntN(3), 3))
		for i := range v.Len() {
			fillRandom(r, v.Index(i), p)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range r.IntN(4) {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fillRandom(r, key, p)
			fillRandom(r, value, p)
			v.SetMapIndex(key, value)
		}
	case reflect.String:
		v.SetString(someTexts[r.IntN(len(someTexts))])
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(someNumbers[r.IntN(len(someNumbers))])
	case reflect.Uint64:
		v.SetUint(uint64(someNumbers[r.IntN(len(someNumbers))]))
	default:
		panic(fmt.Sprintf("%v is not known", v.Type()))
	}
}

// What the descriptions write is what encoding/json would have written, and what
// they read is what it would have read, for whatever is in a record.
func TestCodec_EqualsJSON(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, make := range codedRecords {
		t.Run(fmt.Sprintf("%T", make()), func(t *testing.T) {
			for i := range 2000 {
				v := make()
				fillRandom(r, reflect.ValueOf(v).Elem(), []float64{1, 0.5, 0.9}[i%3])
				want := must(json.Marshal(v))(t)
				got := must(encodeRecord(v))(t)
				if diff := cmp.Diff(string(want), string(got)); diff != "" {
					t.Fatal(diff)
				}
				checkDecode(t, make, want)
			}
		})
	}
}

// The description reads all that is written in practice, or it would be slow.
func TestCodec_ReadsWhatItWrites(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for _, make := range codedRecords {
		for range 100 {
			v := make()
			fillRandom(r, reflect.ValueOf(v).Elem(), 0.8)
			c := codec{reading: true, in: string(must(encodeRecord(v))(t))}
			make().code(&c)
			if c.refused && !hasLongNumber(c.in) || c.pos > len(c.in) {
				t.Fatalf("refused at %d: %s", c.pos, c.in)
			}
		}
	}
}

// hasLongNumber: some of the tests' numbers are left to encoding/json.
func hasLongNumber(s string) bool {
	digits := 0
	for _, b := range s {
		if b < '0' || b > '9' {
			digits = 0
		} else if digits++; digits > maxDigits {
			return true
		}
	}
	return false
}

// checkDecode: both ways agree, on the record or on that it is none.
func checkDecode(t *testing.T, make func() coded, b []byte) {
	t.Helper()
	want, got := make(), make()
	wantErr, gotErr := json.Unmarshal(b, want), decodeRecord(b, got)
	if (wantErr == nil) != (gotErr == nil) {
		t.Fatalf("%s: encoding/json says %v, the codec %v", b, wantErr, gotErr)
	}
	if wantErr == nil && !reflect.DeepEqual(want, got) {
		t.Fatalf("%s:\n%s", b, cmp.Diff(want, got, cmp.AllowUnexported(secretRecord{})))
	}
}

// FuzzCodec looks for a row of which the codec makes something else than
// encoding/json does.
func FuzzCodec(f *testing.F) {
	r := rand.New(rand.NewPCG(5, 6))
	for which, make := range codedRecords {
		for range 20 {
			v := make()
			fillRandom(r, reflect.ValueOf(v).Elem(), 0.9)
			f.Add(uint8(which), must(json.Marshal(v))(f))
		}
	}
	for _, s := range []string{
		``, `null`, `{}`, `{ }`, `{"id":null}`, `{"id":"a","id":"b"}`, `{"ID":"a"}`, `{"id":"a",}`, `{"id":"a"}{`, `{,"id":"a"}`, `{"id":"a" }`,
		`{"id":"a","labels":{}}`, `{"id":"a","labels":{"a":"1","a":"2"}}`, `{"id":"a","spec":{"image":"","command":[]}}`, `{"id":"a","spec":{"stopGrace":null}}`,
		`{"id":"a","generation":1.0}`, `{"id":"a","generation":-0}`, `{"id":"a","generation":01}`, `{"id":"a","revision":-1}`, `{"id":"a","parked":false}`,
		`{"id":"\ud800","createTime":"2026-01-02T03:04:05\u005a"}`, `{"id":"a`, `{"id":"a\`, `{"id":"a\u12"}`, "{\"id\":\"\n\"}", "{\"id\":\"\xff\"}", `{"version":1,"deleted":true}`,
		`{"id":"a","removeTime":"2026-01-02T03:04:05+01:00"}`, `{"id":"a","removeTime":"2026-01-02t03:04:05z"}`, `{"bytes":1,"keyBytes":9223372036854775808}`,
	} {
		for which := range codedRecords {
			f.Add(uint8(which), []byte(s))
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, b []byte) {
		checkDecode(t, codedRecords[int(which)%len(codedRecords)], b)
	})
}

func typicalWorkspace() *Workspace {
	at := someMoments[1]
	return &Workspace{
		ID: "workspace-12345", UID: "0d9e2a34-8f3b-4a57-9d8c-5a3f1c2b4e6d", Labels: map[string]string{"team": "a", "env": "production", "owner": "ada"},
		Spec:  Spec{Image: "registry.example.com/team/image:1.2.3", Env: map[string]string{"A": "1", "B": "2"}, Args: []string{"--flag", "value"}},
		Model: "large", Generation: 7, SpecGeneration: 2, ChangeReason: ReasonSecret, CreateTime: at, UpdateTime: at,
		ConfigRevision: 123456, Revision: 234567,
		Status: Status{
			ObservedGeneration: 7, Starts: 3, RestartCount: 2,
			Running:  &Running{InstanceID: "0d9e2a34-7", PID: 4711, ImageDigest: "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", StartTime: at, SecretVersions: map[string]int64{"K": 1, "L": 2, "M": 3}},
			LastGood: &LastGood{Generation: 7, Spec: Spec{Image: "registry.example.com/team/image:1.2.3", Env: map[string]string{"A": "1", "B": "2"}, Args: []string{"--flag", "value"}}},
		},
	}
}

// BenchmarkCodec sets the descriptions beside encoding/json.
func BenchmarkCodec(b *testing.B) {
	w := typicalWorkspace()
	row := must(encodeRecord(w))(b)
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"encode", func() error { _, err := encodeRecord(w); return err }},
		{"encode-json", func() error { _, err := json.Marshal(w); return err }},
		{"decode", func() error { return decodeRecord(row, &Workspace{}) }},
		{"decode-json", func() error { return json.Unmarshal(row, &Workspace{}) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := c.do(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
