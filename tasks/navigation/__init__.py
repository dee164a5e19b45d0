"""Vision-and-language navigation in Matterport3D graphs: ORIST on R2R, REVERIE and NDH."""
