package store

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"strings"

	"github.com/workspaced/workspaced/store/seal"
)

// A container's token is a beginning by which people and scanners of leaked
// secrets know it, the id of its workspace, by which its record is found without
// an index, and 32 random bytes in base64: nobody finds them by trying hashes, so
// that a slow hash would make nothing safer.
const (
	instanceTokenBegin = "wsi_"
	instanceTokenBytes = 32
)

var instanceTokenForm = regexp.MustCompile(`^` + instanceTokenBegin + `([a-z][a-z0-9-]{0,62})_[A-Za-z0-9_-]{43}$`)

// NewInstanceToken makes a token for a container of the workspace. Its caller
// keeps what is known of it, and hands the token itself to the container alone.
func NewInstanceToken(workspaceID, instanceID string) (seal.Plaintext, *InstanceToken) {
	random := make([]byte, instanceTokenBytes)
	_, _ = rand.Read(random) // never fails
	text := instanceTokenBegin + workspaceID + "_" + base64.RawURLEncoding.EncodeToString(random)
	return seal.New([]byte(text)), &InstanceToken{InstanceID: instanceID, Hash: hashToken(text)}
}

func hashToken(text string) string {
	hash := sha256.Sum256([]byte(text))
	return hex.EncodeToString(hash[:])
}

// InstanceTokenOwner is the id of the workspace for which the token was made, if
// it is one at all; "" if it has no such form.
func InstanceTokenOwner(text string) (workspaceID string) {
	if m := instanceTokenForm.FindStringSubmatch(text); m != nil {
		return strings.Clone(m[1])
	}
	return ""
}

// TokenInstance is the id of the workspace's container whose token it is; "" when
// it is no token, or no longer: that of an earlier container, say. It may be of a
// container that has been started a moment ago and is not on record as the one
// that runs.
func (w *Workspace) TokenInstance(text string) (instanceID string) {
	hash := hashToken(text)
	is := func(other string) bool { return subtle.ConstantTimeCompare([]byte(hash), []byte(other)) == 1 }
	switch st := &w.Status; {
	case st.Running != nil && is(st.Running.TokenHash):
		return st.Running.InstanceID
	case st.Token != nil && is(st.Token.Hash):
		return st.Token.InstanceID
	}
	return ""
}

// HasToken reports whether the instance has a token that is valid now, see
// TokenInstance.
func (w *Workspace) HasToken(instanceID string) bool {
	st := &w.Status
	return st.Running != nil && st.Running.TokenHash != "" && st.Running.InstanceID == instanceID ||
		st.Token != nil && st.Token.InstanceID == instanceID
}
