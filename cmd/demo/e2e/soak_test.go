package e2e

import (
	"fmt"
	"os"
	"time"
)

// soakTime is how long the long form of a test is to take, from WORKSPACED_SOAK,
// a duration; 0, when there is none: the short form.
func soakTime() time.Duration {
	text := os.Getenv("WORKSPACED_SOAK")
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		panic(fmt.Sprintf("WORKSPACED_SOAK=%q is no duration such as 60s", text))
	}
	return d
}
