// Package canary is for tests: it makes values that are recognized wherever they
// turn up, in whatever usual encoding, and looks for them in text, files,
// archives and processes.
//
//	canaries := canary.New()
//	secret := canaries.Value("set by SetSecret")
//	... use secret ...
//	for _, hit := range canaries.Find(log) { t.Error(hit) }
//
// All values of a Set begin with the same random marker, so that one search finds
// them all, those that were cut off behind it as well. It consists of letters and
// digits alone, which JSON, URLs, shells and quoting leave as they are.
package canary

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Lengths of the marker and of what follows it in a value.
const (
	markerLen = 16
	ownLen    = 10
)

// Set is a set of canaries. Its methods may be called by several goroutines.
type Set struct {
	marker string

	mu      sync.Mutex
	values  []value
	needles []needle
	index   *index // of needles
}

type value struct{ name, text string }

// needle is how the marker, or a value without it, looks in one form.
type needle struct {
	form  *form
	index int    // among what the form makes
	name  string // of a value without the marker
	bytes []byte
}

// New makes an empty set.
func New() *Set {
	s := &Set{marker: "c" + random(markerLen-1)} // a letter: ids begin with one
	s.add("", s.marker)
	return s
}

func (s *Set) add(name, text string) {
	for i := range forms {
		for j, b := range forms[i].of([]byte(text)) {
			s.needles = append(s.needles, needle{&forms[i], j, name, b})
		}
	}
	s.index = newIndex(s.needles)
}

// Add adds a value that somebody else has made, of at least 16 bytes. It is found as a
// whole alone.
func (s *Set) Add(name, text string) {
	if len(text) < markerLen {
		panic("canary: too short to be found without doubt")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(name, text)
}

// random returns so many random characters of a-z and 2-7.
func random(n int) string { return strings.ToLower(rand.Text()[:n]) }

// Value makes a value. Whoever finds it is told the name. It consists of lower-case
// letters and digits, begins with a letter, and has 26 of them.
func (s *Set) Value(name string) string {
	v := value{name, s.marker + random(ownLen)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values = append(s.values, v)
	return v.text
}

// Hit is a value that was found.
type Hit struct {
	// Name is the value's, or empty if only its beginning is there.
	Name string
	// Form is how it is encoded: one of Forms.
	Form string
	// Where it is; Find leaves it empty.
	Where string
}

// String tells where what was found.
func (h Hit) String() string {
	name := fmt.Sprintf("the value %q", h.Name)
	if h.Name == "" {
		name = "the beginning of a value"
	}
	return strings.TrimPrefix(fmt.Sprintf("%s: %s, %s", h.Where, name, h.Form), ": ")
}

// Find returns the values in data, each once a form.
func (s *Set) Find(data []byte) []Hit {
	var hits []Hit
	s.find(data, len(data), func(h Hit) {
		if !slices.Contains(hits, h) {
			hits = append(hits, h)
		}
	})
	return hits
}

// find calls hit with what begins in the first bytes of data, at least once a
// name and form.
func (s *Set) find(data []byte, first int, hit func(Hit)) {
	s.mu.Lock()
	index := s.index
	s.mu.Unlock()
	index.find(data, first, func(n needle, rest []byte) {
		hit(Hit{Name: s.name(rest, n), Form: n.form.name})
	})
}

// name tells which value data begins with; empty if the form is one of the marker
// alone.
func (s *Set) name(data []byte, n needle) string {
	if n.name != "" {
		return n.name
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.values {
		if text := n.form.of([]byte(v.text))[n.index]; len(text) > len(n.bytes) && bytes.HasPrefix(data, text) {
			return v.name
		}
	}
	return ""
}
