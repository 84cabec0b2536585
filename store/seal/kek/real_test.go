//go:build kms

package kek_test

import (
	"os"
	"strings"
	"testing"

	"github.com/workspaced/workspaced/store/seal/kek"
)

// TestReal does the same with real key services: the first two of the URIs in
// WORKSPACED_KEY_URIS are of two keys of one service, the next two of another.
// What their programs are told by is told here too. See make kms.
func TestReal(t *testing.T) {
	uris := strings.Fields(os.Getenv("WORKSPACED_KEY_URIS"))
	if len(uris) < 2 {
		t.Fatal("WORKSPACED_KEY_URIS names no two keys")
	}
	for ; len(uris) >= 2; uris = uris[2:] {
		t.Run(uris[0], func(t *testing.T) {
			testWraps(t, must(kek.Open(t.Context(), uris[0], false))(t), must(kek.Open(t.Context(), uris[1], false))(t))
		})
	}
}
