package e2e

import (
	"os"
	"testing"
	"time"

	"github.com/workspaced/workspaced/cmd/demo/internal/proof"
	"github.com/workspaced/workspaced/cmd/internal/lab"
)

// The demo's proof, the same code as `make demo`.
func TestDemoProof(t *testing.T) {
	onEach(t, 6*time.Minute, testProof)
}

func testProof(t *testing.T, s *stage, short bool) {
	ref, hold, err := s.PushSlow(s.ctx, "2")
	if err != nil {
		t.Fatal(err)
	}
	pairs := 25 // make demo: 200
	switch {
	case short:
		pairs = 12
	case soakTime() > 0:
		pairs = 200
	}
	err = proof.Run(s.ctx, proof.Config{
		Client:      s.client(),
		Image:       lab.DemoImage,
		SlowImage:   ref,
		Hold:        hold,
		VolumeDir:   s.VolumeDir,
		WorkspaceID: "proof",
		Pairs:       pairs,
		Out:         os.Stderr,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.settle(0)
}
