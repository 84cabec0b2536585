package rows

import (
	"fmt"
	"log/slog"
	"os"

	"google.golang.org/grpc"

	"github.com/workspaced/workspaced/server/access"
)

// unixCredentials are the daemon's own for a unix socket: who runs the benchmark
// may do everything there.
func unixCredentials() grpc.ServerOption {
	bindings, err := access.ParseBindings([]string{fmt.Sprintf("unix:uid=%d admin", os.Getuid())}, 0)
	if err != nil {
		panic(err) // a mistake in the line above
	}
	return grpc.Creds(access.NewCredentials(access.CredentialsConfig{Bindings: bindings, Logger: slog.New(slog.DiscardHandler)}))
}
